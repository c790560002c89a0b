"""Every shipped YAML composes; parse() reports every problem with its full key."""

import functools
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import yaml

import configs
from cluster.preflight import PreflightConfig
from cluster.submit import SubmitConfig
from configs.entry import Command, compose, main
from configs.parse import ConfigError, parse
from data_sharding.config import ShardingConfig
from data_sharding.phantoms.study.config import PhantomConfig
from data_sharding.report import SetReportConfig
from data_sharding.source_phantoms import SourcePhantomConfig
from data_sharding.verify import VerifyConfig
from finetune.config import CompareConfig, DiagnoseConfig, FinetuneConfig, PairsConfig, PredictConfig
from pretrain.masked.config import PretrainConfig
from training.grid import GridConfig
from training.pull import PullConfig
from training.runs import RunsConfig


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
    "data_sharding.phantom": (PhantomConfig, ["out=a"]),
    "data_sharding.report": (SetReportConfig, ["set=a"]),
    "data_sharding.source_phantoms": (SourcePhantomConfig, ["out=a"]),
    "data_sharding.verify": (VerifyConfig, ["set=a"]),
    "pretrain": (PretrainConfig, ["kind=bold", "shards=a", "run.folder=b"]),
    "pretrain.analysis": (PretrainConfig, ["kind=bold", "shards=a", "run.folder=b"]),
    "training.grid": (GridConfig, ["part=pretrain"]),
    "training.pull": (PullConfig, ["name=a@b", "folder=c"]),
    "training.runs": (RunsConfig, ["tracking=http://a"]),
    "cluster.preflight": (PreflightConfig, ["part=pretrain"]),
    "cluster.submit": (SubmitConfig, ["part=pretrain"]),
    "finetune": (FinetuneConfig, ["shards=a", "encoder=models:/a@candidate", "run.folder=b"]),
    "finetune.compare": (CompareConfig, ["shards=a", "encoders=[a@x,b@x]", "run.folder=b"]),
    "finetune.rdm_pairs": (PairsConfig, ["shards=a", "out=b.csv"]),
    "finetune.diagnose": (DiagnoseConfig, ["shards=a", "encoder=scratch", "run.folder=b"]),
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


@pytest.mark.parametrize(("name", "least"), [("pretrain", 10), ("finetune", 10), ("data_sharding", 7)])
def test_help_lists_the_keys_that_people_change_with_their_values(name: str, least: int) -> None:
    page = subprocess.run([sys.executable, "-m", name, "--help"], capture_output=True, text=True, check=True).stdout
    section = page.split("Often changed:\n")[1].split("\n\n")[0]
    listed = dict(line.split()[0].split("=", 1) for line in section.splitlines() if "=" in line)
    composed = compose(name, PARTS[name][1])
    for key, shown in listed.items():
        value = functools.reduce(lambda group, part: group[part], key.split("."), composed)
        assert shown.startswith("<") or yaml.safe_load(shown) == value, (key, value)
    assert len(listed) >= least


def test_a_misspelt_override_is_refused_and_the_known_choices_are_named() -> None:
    for override, told in {
        "engine=zero9": "engine=zero9: unknown choice; choose one of plain, zero0, zero1, zero2, zero3;",
        "train.stepz=3": "train.stepz: unknown key, did you mean train.steps?",
        "learning_rate=1": "learning_rate: unknown key, did you mean train.optimizer.learning_rate?",
        "lr=1": "lr: unknown key, did you mean train.optimizer.learning_rate?",
        "train.lr=1": "train.lr: unknown key, did you mean train.optimizer.learning_rate?",
        "train.run.folder=a": "train.run.folder: unknown key, did you mean run.folder?",
        "engin=zero2": "engin: unknown key, did you mean engine?",
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


ALL_COMMANDS = sorted(path.stem for path in ROOT.glob("*.yaml"))


def test_every_command_has_its_yaml_and_every_yaml_its_command() -> None:
    top = ROOT.parent
    packages = ("data_sharding", "pretrain", "finetune", "training", "cluster")
    modules = [path for package in packages for path in (top / package).rglob("*.py")]
    commands = [path for path in modules if re.search(r"^    main\(\"", path.read_text(), flags=re.MULTILINE)]
    names = [".".join(path.relative_to(top).with_suffix("").parts).removesuffix(".__main__") for path in commands]
    assert sorted(names) == ALL_COMMANDS == sorted(PARTS)


HELP_PAGES = """
import contextlib, io, json, runpy, sys
pages = {}
for name in sys.argv[1:]:
    sys.argv = [name, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as page:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    pages[name] = page.getvalue()
print(json.dumps({"pages": pages, "modules": list(sys.modules)}))
"""


def test_help_says_purpose_example_and_what_is_required_and_imports_nothing_heavy() -> None:
    command = [sys.executable, "-c", HELP_PAGES, *ALL_COMMANDS]
    done = subprocess.run(command, cwd=ROOT.parent, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert sorted(found["pages"]) == ALL_COMMANDS
    for name, page in found["pages"].items():
        first_screen = "\n".join(page.splitlines()[:24])
        assert f"python -m {name} " in first_screen
        assert "Required" in first_screen
        assert all(f"\n  {flag} " in page for flag in ("--help", "--validate", "--plan", "--show"))
    heavy = {"torch", "mlflow", "ray", "hydra", "s3fs", "nibabel", "pandas", "sklearn"}
    assert heavy.isdisjoint(found["modules"])


@dataclass
class Target:
    part: str
    words: list[str]
    wait: bool = True


def target_of(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> Target:
    """What main() makes of a command line that has two positional keys, the last of them a list."""
    seen: list[Target] = []
    monkeypatch.setattr("sys.argv", ["command", *arguments])
    monkeypatch.setattr("configs.entry.compose", lambda name, overrides: {"words": [], "wait": not overrides})
    with pytest.raises(SystemExit):
        main("x", "", lambda: Command(Target, seen.append, str), positional=("part", "words..."))
    return seen[0]


def test_words_without_a_sign_fill_the_positional_keys_and_the_last_takes_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert target_of("pretrain", "a=1", "b", monkeypatch=monkeypatch) == Target("pretrain", ["a=1", "b"], wait=True)
    assert target_of("wait=false", "pretrain", "a=1", monkeypatch=monkeypatch) == Target(
        "pretrain", ["a=1"], wait=False
    )


def test_a_flag_nobody_knows_is_refused_and_an_error_that_is_not_for_users_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["x", "--profile"])
    with pytest.raises(SystemExit, match="2"):
        main("training.runs", "", lambda: Command(RunsConfig, print, str))
    said = (
        "unknown flag --profile; known: --help, --validate, --plan, --show, --verbose; a key has no dashes: profile=..."
    )
    assert said in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["x", "tracking=a"])
    with pytest.raises(ValueError, match="invalid literal"):
        main("training.runs", "", lambda: Command(RunsConfig, lambda config: int(config.tracking), str))


def test_validate_finds_what_a_run_would_only_meet_later(tmp_path: Path) -> None:
    def problems(*words: str) -> str:
        done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, check=False)
        assert done.returncode == 2, done.stdout + done.stderr
        return done.stderr

    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    no_scan = ["data_sharding", f"source.root={tmp_path}/empty", f"out={tmp_path}/set", "--validate"]
    assert "empty: no scan found. Looked for sub-*" in problems(*no_scan)
    assert not (tmp_path / "set").exists()
    common = ["pretrain", f"shards={tmp_path}/set", f"run.folder={tmp_path}/file/run", "cluster.use_gpu=true"]
    told = problems(*common, "kind=bold", "--validate")
    assert f"run.folder: {tmp_path}/file is a file; give another location" in told
    assert "cluster.use_gpu: 2 workers need a GPU each, this machine shows 0" in told
    assert [line.split(":")[0] for line in problems("pretrain", "--validate").splitlines()[1:]] == [
        "  - kind",
        "  - shards",
        "  - run.folder",
    ]
