"""Every shipped YAML composes; parse() reports every problem with its full key."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

import configs
from configs.entry import compose, main
from configs.parse import ConfigError, parse
from data_sharding.config import ShardingConfig
from data_sharding.phantoms.study.config import PhantomConfig
from data_sharding.source_phantoms import SourcePhantomConfig
from finetune.config import CompareConfig, FinetuneConfig, PredictConfig
from pretrain.masked.config import PretrainConfig


@dataclass
class Optimizer:
    learning_rate: float
    betas: tuple[float, float]


@dataclass
class Job:
    name: str
    steps: int
    engine: Literal["plain", "zero2"]
    optimizer: Optimizer
    note: str | None


GOOD = {
    "name": "a",
    "steps": 3,
    "engine": "plain",
    "optimizer": {"learning_rate": 1, "betas": [0.9, 0.95]},
    "note": None,
}


@pytest.mark.parametrize(("schema", "trains"), [(PretrainConfig, True), (FinetuneConfig, True), (PhantomConfig, False)])
def test_a_command_that_trains_can_be_profiled_and_no_other(
    schema: type, trains: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(*arguments: str) -> None:
        monkeypatch.setattr("sys.argv", ["command", *arguments])
        main(part="phantom", schema=schema, help_text="", run=print, validate=lambda _: [], plan=str)

    command("--help")
    assert ("--profile" in capsys.readouterr().out) == trains
    if not trains:
        with pytest.raises(SystemExit, match="2"):
            command("--profile", "out=unused")
        told = capsys.readouterr().err
        assert "unknown flag --profile; known: --help, --validate, --plan, --show\n" in told


def test_a_good_mapping_becomes_dataclasses_and_an_int_serves_as_float() -> None:
    job = parse(GOOD, Job)
    assert job == Job("a", 3, "plain", Optimizer(1.0, (0.9, 0.95)), None)
    assert isinstance(job.optimizer.learning_rate, float)


def test_unknown_missing_and_mistyped_keys_are_reported_together_with_full_names() -> None:
    raw = {
        "name": "???",
        "steps": True,
        "engine": "zero",
        "optimizer": {"learning_rte": 0.1, "betas": [0.9]},
        "note": None,
    }
    with pytest.raises(ConfigError) as caught:
        parse(raw, Job)
    message = str(caught.value)
    assert message.startswith("6 problems")
    assert "name: required; add name=<str>" in message
    assert "steps: expected int, got True (bool)" in message
    assert "engine: 'zero' is not one of plain, zero2, did you mean zero2?" in message
    assert "optimizer.learning_rte: unknown key, did you mean optimizer.learning_rate?" in message
    assert "optimizer.learning_rate: missing; add optimizer.learning_rate=<float>" in message
    assert "optimizer.betas: expected 2 values, got 1" in message


ROOT = Path(configs.__file__).parent
PARTS = {
    "data_sharding": (ShardingConfig, ["source.root=a", "out=b"]),
    "phantom": (PhantomConfig, ["out=a"]),
    "source_phantoms": (SourcePhantomConfig, ["out=a"]),
    "pretrain": (PretrainConfig, ["kind=bold", "shards=a", "run.folder=b"]),
    "finetune": (FinetuneConfig, ["shards=a", "encoder=models:/a@candidate", "run.folder=b"]),
    "finetune.compare": (CompareConfig, ["shards=a", "encoders=[a@x,b@x]", "run.folder=b"]),
    "finetune.predict": (PredictConfig, ["registered_model=models:/a@candidate", "scans=[a]", "out=b.csv"]),
}
# Which commands a group's files belong to; an experiment says it itself, by the command in its header.
GROUPS = {
    "cluster": ["data_sharding", "pretrain", "finetune"],
    "dataset": ["data_sharding"],
    "engine": ["pretrain", "finetune"],
    "masking": ["pretrain"],
    "model": ["pretrain"],
    "peaks": ["pretrain", "finetune"],
    "registration": ["data_sharding"],
    "space": ["data_sharding"],
    "task": ["finetune"],
}


def selections() -> list[tuple[str, str]]:
    """Returns (command, override) for every shipped YAML file of every group."""
    found = [(part, "") for part in PARTS]
    for path in sorted(ROOT.glob("*/*.yaml")):
        group, choice = path.parent.name, path.stem
        if group == "experiment":
            command = re.search(r"#\s+python -m ([\w.]+) ", path.read_text())
            assert command is not None, f"{path}: its header holds no command"
            parts = [command.group(1)]
        else:
            parts = GROUPS[group]
        found += [(part, f"{group}={choice}") for part in parts]
    return found


@pytest.mark.parametrize(("part", "selection"), selections())
def test_every_shipped_yaml_composes_and_parses(part: str, selection: str) -> None:
    schema, required = PARTS[part]
    composed = compose(part, required + ([selection] if selection else []))
    assert without_required(composed, schema) == []


def without_required(composed: dict, schema: type) -> list[str]:
    """Returns what parse() complains about, apart from values that a file leaves to the user."""
    try:
        parse(composed, schema)
    except ConfigError as error:
        return [problem for problem in str(error).splitlines()[1:] if ": required; add " not in problem]
    return []


def test_a_misspelt_override_is_refused_and_the_known_choices_are_named() -> None:
    for override, told in {
        "engine=zero9": "engine=zero9: there is none of that name; choose one of plain, zero0, zero1, zero2, zero3;",
        "train.stepz=3": "train.stepz: unknown key, did you mean train.steps?;",
        "learning_rate=1": "learning_rate: unknown key, did you mean train.optimizer.learning_rate?;",
        "train.run.folder=a": "train.run.folder: unknown key, did you mean run.folder?;",
        "engin=zero2": "engin: unknown key, did you mean engine?;",
        "shards=~/brains": "shards=~/brains cannot be read as key=value; put a value with spaces",
    }.items():
        with pytest.raises(ConfigError) as caught:
            compose("pretrain", [*PARTS["pretrain"][1], override])
        assert str(caught.value).startswith(told)
        assert "\n" not in str(caught.value)


def test_an_empty_value_a_number_for_a_label_and_a_key_that_is_used_twice_are_each_told_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse(compose("pretrain", ["kind=bold", "shards=", "atlas=1"]), PretrainConfig)
    assert str(caught.value).splitlines() == [
        "3 problems in the configuration:",
        "  - shards: expected str, got '' (str); give shards=<str>",
        "  - atlas: expected str, got 1 (int); give \"atlas='1'\"",
        "  - run.folder: required; add run.folder=<str>",
    ]
