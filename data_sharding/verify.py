"""Re-reads a whole shard set and names the first bad byte range of each object that is not as written.

Examples:
  python -m data_sharding.verify out/shards
  python -m data_sharding.verify out/shards --repair source.root=/data/bids

Exits 1 when anything is wrong, 0 when every hash, count, checksum and index row holds. With --repair what is damaged is
written again from the scans, to the very bytes it had; key=value gives what a set does not remember (where scans lie).
"""

from __future__ import annotations

import sys

from configs.entry import told_to_users
from data_sharding.check.repair import repair
from data_sharding.check.verify import verify
from data_sharding.read.shard_set import open_set


def main() -> int:
    """The exit code of the command line."""
    arguments = sys.argv[1:]
    wants_repair = arguments[1:2] == ["--repair"]
    if not arguments or arguments[0].startswith("-") or (len(arguments) > 1 and not wants_repair):
        print((__doc__ or "").strip())
        return 0 if arguments in (["-h"], ["--help"]) else 2
    location = arguments[0]
    with told_to_users():
        problems = verify(location)
        for problem in problems:
            print(f"BAD {location}/{problem}")
        if problems and wants_repair:
            for line in repair(location, problems, overrides=arguments[2:]):
                print(line, flush=True)
            problems = verify(location)
    if problems:
        print(f"write them again with 'python -m data_sharding.verify {location} --repair source.root=<the scans>'")
        return 1
    manifest = open_set(location).manifest
    print(f"{location} is as written: {len(manifest.shards)} shards, {manifest.counts['bytes']} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
