"""How numbers read on a terminal: counts with their noun, sizes, aligned tables, and the command to type next."""

import shlex
from collections.abc import Collection, Iterable, Sequence

UNITS = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


def counted(number: float, noun: str, plural: str | None = None) -> str:
    """`1 scan`, `3,200 scans`; `plural` where it is more than an s."""
    return f"{number:,.0f} {noun if number == 1 else plural or f'{noun}s'}"


def size_of(num_bytes: float) -> str:
    """`4.2 MB`: decimal units, as disks and links have them."""
    for unit, size in UNITS:
        if round(num_bytes / size, 1) >= 1:  # 999,999 bytes are 1.0 MB, not 1,000.0 kB
            return f"{num_bytes / size:,.1f} {unit}"
    return counted(num_bytes, "byte")


def aligned(rows: Iterable[Sequence[str]]) -> str:
    """A line per row, every column as wide as its longest cell."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def next_command(part: str, *overrides: str) -> str:
    """The last line of a command: what to type next, quoted for a shell."""
    return f"next: {shlex.join(['python', '-m', part, *overrides])}"


def listed(words: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def span(numbers: Collection[float]) -> str:
    """`48` where all numbers are the same, `48 to 96` where not."""
    low, high = min(numbers), max(numbers)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
