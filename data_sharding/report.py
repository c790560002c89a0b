"""Writes one HTML page about a shard set: what it holds, how good it is, what was refused, how its splits compare.

Example:
  python -m data_sharding.report out/shards

The page is <set>/report.html and needs no other file and no network. Means are taken over a fixed subset of scans.
"""

from __future__ import annotations

import sys

from configs.entry import told_to_users
from data_sharding.check.report import REPORT, render
from data_sharding.read.shard_set import open_set


def main() -> int:
    """The exit code of the command line."""
    arguments = sys.argv[1:]
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print((__doc__ or "").strip())
        return 0 if arguments in (["-h"], ["--help"]) else 2
    with told_to_users():
        shard_set = open_set(arguments[0])
        shard_set.store.put(REPORT, render(shard_set).encode())
        print(f"wrote {shard_set.store.join(REPORT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
