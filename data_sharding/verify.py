"""Check every byte of a shard set; repair it from the scans.

Names the first bad byte range of each object that is not as written.

Examples:
  python -m data_sharding.verify out/shards
  python -m data_sharding.verify out/shards source.root=/data/bids

Required: the shard set

Exits 1 when anything is wrong, 0 when every hash, count, checksum and index row holds. Given where the scans are (and
whatever else a set does not record), it deletes what is damaged and rebuilds it from the scans, to the same bytes.
"""

from dataclasses import dataclass

from configs.entry import Command, main
from configs.words import counted, next_command, size_of


@dataclass
class VerifyConfig:
    """Which set, and what it does not record; without that nothing is repaired."""

    set: str
    repair: list[str]


def run(config: VerifyConfig) -> int:
    from data_sharding.check.verify import repair, verify
    from data_sharding.read.shard_set import open_set

    problems = verify(config.set)
    for problem in problems:
        print(f"BAD {config.set}/{problem}")
    if problems and config.repair:
        repair(config.set, {problem.name for problem in problems}, overrides=config.repair)
        problems = verify(config.set)
    if problems:
        print(f"next: python -m data_sharding.verify {config.set} source.root=<the scans>, to write them again")
        return 1
    manifest = open_set(config.set).manifest
    size = f"{counted(len(manifest.shards), 'shard')}, {size_of(manifest.counts['bytes'])}"
    print(f"{config.set} is as written: {size}, every byte read")
    print(next_command("data_sharding.report", config.set))
    return 0


def command() -> Command:
    return Command(VerifyConfig, run, lambda config: f"read every byte of {config.set}")


if __name__ == "__main__":
    main("data_sharding.verify", __doc__, command, positional=("set", "repair..."))
