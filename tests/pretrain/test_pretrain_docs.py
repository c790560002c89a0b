"""Every command of docs/pretraining.md parses: its overrides exist and have the right types."""

import re
import shlex
from pathlib import Path

import pytest

from configs.entry import compose
from configs.parse import parse
from data_sharding.config import ShardingConfig, validate_config
from pretrain.masked.config import PretrainConfig
from pretrain.masked.validation import naming_problems, number_problems, window_problems

PAGE = Path(__file__).parents[2] / "docs" / "pretraining.md"
SCHEMAS = {"pretrain": PretrainConfig, "data_sharding": ShardingConfig}


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    return [
        line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.startswith("python -m ")
    ]


@pytest.mark.parametrize("command", commands())
def test_a_documented_command_composes_into_its_schema_without_a_problem(command: str) -> None:
    _, _, part, *overrides = shlex.split(command)
    part = part.removesuffix(".analysis")
    config = parse(compose(part, overrides), SCHEMAS[part])
    if isinstance(config, ShardingConfig):
        assert [problem for problem in validate_config(config) if not problem.startswith("source.root: /data/")] == []
    else:
        assert naming_problems(config) == []
        assert number_problems(config) == []
        assert [problem for name in config.named_sets for problem in window_problems(config, name)] == []


def test_the_page_has_recipes_for_every_data_set_and_a_joint_run() -> None:
    written = commands()
    assert len(written) >= 14
    assert {"dataset=adhd200", "dataset=bids"} <= {word for command in written for word in shlex.split(command)}
    assert any("sets.rest={" in command for command in written)
