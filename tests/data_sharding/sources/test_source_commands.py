"""What a data set's configuration tells a newcomer to type works as it stands."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from data_sharding.check.verify import verify
from data_sharding.read.shard_set import open_set
from data_sharding.sources import kinds_of_source

FAULT_SECTION = "Commands of the sources' headers"

CONFIGS = Path(__file__).parents[3] / "configs"
COMMAND = re.compile(r"^# +python (-m .*)$", flags=re.MULTILINE)
HEADERS = {path.stem: path for path in (CONFIGS / "dataset").glob("*.yaml") if COMMAND.search(path.read_text())}


def test_every_source_has_a_header_with_its_commands() -> None:
    assert sorted(HEADERS) == kinds_of_source()


@pytest.mark.faults
@pytest.mark.parametrize("name", sorted(HEADERS))
def test_the_commands_of_a_header_write_sets_that_verify(name: str, tmp_path: Path) -> None:
    sets = []
    for text in COMMAND.findall(HEADERS[name].read_text()):
        arguments = shlex.split(text.replace("out/", f"{tmp_path}/"))
        if "data_sharding" in arguments:
            arguments.append("cluster=inline")
            sets += [argument.removeprefix("out=") for argument in arguments if argument.startswith("out=")]
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"python {text}\n{done.stderr}"
    assert sets
    for location in sets:
        assert open_set(location).manifest.shards
        assert verify(location) == []
