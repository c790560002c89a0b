"""What the benchmarks share: CPU time of interleaved contenders, tables, and what a run has to say about itself."""

import argparse
import datetime
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

Row = dict[str, str | float]

HOW = (
    "CPU seconds of one thread, the least of {repetitions} interleaved repetitions of every contender: the machine is "
    "shared, and the least is what others disturbed least."
)


def cpu_seconds(contenders: dict[str, Callable[[], object]], *, repetitions: int) -> dict[str, float]:
    """The least CPU time of each contender; they take turns, so that a slow minute hits all of them."""
    least = dict.fromkeys(contenders, float("inf"))
    for _ in range(repetitions):
        for name, contender in contenders.items():
            started = time.process_time()
            contender()
            least[name] = min(least[name], time.process_time() - started)
    return least


def markdown(rows: list[Row]) -> str:
    """The rows as a markdown table; numbers with three significant digits."""
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(_cell(row[column]) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def about() -> str:
    """Date, commit and machine, in one line."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    python = f"Python {platform.python_version()}"
    cores = f"{os.cpu_count()} shared cores, load {os.getloadavg()[0]:.1f}"
    return f"{datetime.date.today()}, commit {commit}, {cpu}, {cores}, {python}"


def report(title: str, tables: dict[str, list[Row]], *, repetitions: int, json_path: Path | None) -> None:
    """Prints the tables as markdown; writes the same numbers to `json_path`."""
    print(f"# {title}\n\n{about()}.\n{HOW.format(repetitions=repetitions)}")
    for name, rows in tables.items():
        print(f"\n## {name}\n\n{markdown(rows)}")
    if json_path is not None:
        document = {"about": about(), "repetitions": repetitions, "tables": tables}
        json_path.write_text(json.dumps(document, indent=1) + "\n")


def arguments_of(description: str | None) -> argparse.ArgumentParser:
    """A parser that knows what every benchmark takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the same numbers")
    parser.add_argument("--folder", type=Path, help="where to make the data (about 2 GB); default: a temporary folder")
    return parser


def _cell(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
