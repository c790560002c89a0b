"""A JSON line for every test that does harm, and the tables of docs/faults.md made of them.

CALLOSUM_FAULTS names the file the lines are appended to. A test says more about itself by pytest's `record_property`:
"fault" (what was done to whom), "when" and "recovery_s"; its module names the table by FAULT_SECTION. A run replaces
the tables it has lines for and leaves the others; a table that has its heading in docs/operations.md goes there:

  python -m tests.fault_report out/faults.jsonl docs/faults.md docs/operations.md
"""

from __future__ import annotations

import datetime
import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

MARKERS = ("faults", "injected")
HEAD = """# What was broken on purpose, and what held

Made by `make test-faults`: the tests do the harm, each appends a line, `tests/fault_report.py` makes the tables. A
claim is a test's name; held means that it was true afterwards. Recovery is the time from the fault to the finished,
compared result; where a process was killed it is the whole second run, imports included.
"""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Appends the line of a finished test."""
    report = yield
    target = os.environ.get("CALLOSUM_FAULTS")
    does_harm = any(item.get_closest_marker(marker) for marker in MARKERS)
    if target and does_harm and (report.when == "call" or report.failed):
        with Path(target).open("a") as file:
            file.write(json.dumps(line_of(item, report)) + "\n")
    return report


def line_of(item: pytest.Item, report: pytest.TestReport) -> dict[str, Any]:
    """What is known of a finished test."""
    module = item.module  # type: ignore[attr-defined]
    about: dict[str, Any] = {
        "section": getattr(module, "FAULT_SECTION", module.__name__.rpartition(".")[2].replace("_", " ")),
        "test": item.name.partition("[")[0].removeprefix("test_").replace("_", " "),
        "fault": item.name.partition("[")[2].removesuffix("]").replace("-", ", "),
        "when": "",
        "recovery_s": None,
        "held": report.passed,
        "took_s": report.duration,
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "commit": commit(),
    }
    return about | {name: value for name, value in report.user_properties if name in about}


def commit() -> str:
    """The commit that was tested; `-dirty` where files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=8"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def rendered(tables: dict[str, str], before: str) -> str:
    """The page with these tables; others stay as they are in `before`."""
    found = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", before, flags=re.MULTILINE | re.DOTALL))
    tables = found | tables
    return HEAD + "".join(f"\n## {section}\n{tables[section].rstrip()}\n" for section in sorted(tables))


def _table(lines: list[dict[str, Any]]) -> str:
    num_held = sum(line["held"] for line in lines)
    commits = ", ".join(sorted({line["commit"] for line in lines}))
    minutes = sum(line["took_s"] for line in lines) / 60
    rows = [
        f"{num_held} of {len(lines)} held; {max(line['date'] for line in lines)}, commit {commits}; {minutes:.0f} min.",
        "",
        "| claim | fault | when | held | recovery, s |",
        "|---|---|---|---|---|",
    ]
    for line in lines:
        recovery = "" if line["recovery_s"] is None else f"{line['recovery_s']:.1f}"
        held = "yes" if line["held"] else "**NO**"
        rows.append(f"| {line['test']} | {line['fault']} | {line['when']} | {held} | {recovery} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    source, target, other = (Path(argument) for argument in sys.argv[1:])
    by_section: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in map(json.loads, source.read_text().splitlines()):
        by_section[line["section"]].append(line)
    tables = {section: _table(lines) for section, lines in by_section.items()}
    page = other.read_text()
    for section in [section for section in tables if f"\n### {section}\n" in page]:
        before, heading, rest = page.partition(f"\n### {section}\n")
        page = before + heading + tables.pop(section) + rest[rest.index("\n##") :]
    other.write_text(page)
    target.write_text(rendered(tables, target.read_text()))


if __name__ == "__main__":
    main()
