"""Write one HTML page about a shard set.

Its contents, quality, refused scans and balance of the splits.

Example:
  python -m data_sharding.report out/shards

Required: the shard set

The page is <set>/report.html and needs no other file and no network. Means are taken over a fixed subset of scans.
"""

import shlex
from dataclasses import dataclass

from configs.entry import Command, main


@dataclass
class SetReportConfig:
    """Which set."""

    set: str


def run(config: SetReportConfig) -> None:
    from data_sharding.check.report import REPORT, render
    from data_sharding.hints import after_set, contents
    from data_sharding.read.shard_set import open_set
    from reports.page import origin_of

    shard_set = open_set(config.set)
    origin = origin_of(shlex.join(["python", "-m", "data_sharding.report", config.set]))
    shard_set.store.put(REPORT, render(shard_set, origin).encode())
    lines = [f"{config.set}:", contents(shard_set.manifest), f"report: {shard_set.store.join(REPORT)}"]
    print("\n".join(filter(None, [*lines, after_set(shard_set.manifest, config.set)])))


def command() -> Command:
    return Command(SetReportConfig, run, lambda config: f"a page about {config.set}: {config.set}/report.html")


if __name__ == "__main__":
    main("data_sharding.report", __doc__, command, positional=("set",))
