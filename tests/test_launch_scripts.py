"""The launch scripts do what a reader would type: checked by bash, composed, and once run on a small phantom."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from configs.entry import combinations, compose
from configs.parse import parse
from finetune.compare.cells import arms_of
from finetune.config import CompareConfig, FinetuneConfig
from finetune.tasks import parse_task
from finetune.tasks.contrastive_alignment.config import Config
from pretrain.masked.config import PretrainConfig

FAULT_SECTION = "Launch scripts"

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("*/launch/*.sh"))
INLINE = "engine=plain cluster=inline cluster.num_workers=1 data.num_workers=0"


def bash(command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        **variables,
    }
    return subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=3600
    )


def passed(command: str, **variables: str) -> str:
    done = bash(command, **variables)
    assert done.returncode == 0, f"$ {command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_launch_script_is_valid_bash_and_asks_for_its_shards(script: str) -> None:
    passed(f"bash -n {script}")
    without = bash(f"bash {script}", SHARDS="")
    assert without.returncode != 0
    assert "a shard set" in without.stderr


def test_the_masking_experiment_pretrains_every_arm_and_seed_alike_and_compares_them_with_the_first(
    tmp_path: Path,
) -> None:
    """The commands it shows compose, the first for each backbone with its own arm and seed."""
    shown = passed(
        "bash pretrain/launch/region_vs_random.sh",
        LAUNCH="echo",
        SHARDS="/brains",
        OUT=str(tmp_path),
        ARMS="random tube",
        SEEDS="0 1",
        PRETRAIN="model=small",
    )
    (command, part, *overrides), comparison = [line.split() for line in shown.splitlines()]
    assert command == "training.grid"
    found = [parse(compose(part, each), PretrainConfig) for each in combinations(overrides)]
    assert [(each.masking.kind, each.train.seed, each.data.seed) for each in found] == [
        ("random", 0, 0),
        ("random", 1, 1),
        ("tube", 0, 0),
        ("tube", 1, 1),
    ]
    names = [f"{arm}-{seed}" for arm in ("random", "tube") for seed in (0, 1)]
    assert [each.run.folder for each in found] == [f"{tmp_path}/pretrain/{name}" for name in names]
    assert [each.register.names["bold"] for each in found] == [f"masks-{name}" for name in names]
    assert len({(each.train.steps, each.masking.hidden_share, each.shards) for each in found}) == 1
    assert comparison[0] == "finetune.compare"
    config = parse(compose("finetune.compare", comparison[1:]), CompareConfig)
    assert config.seeds == [0, 1, 2]
    assert arms_of(config) == {
        arm: [f"models:/masks-{arm}-{seed}@candidate" for seed in (0, 1)] for arm in ("random", "tube")
    }


def test_a_stage_passes_its_variables_and_arguments_on() -> None:
    def shown(script: str, arguments: str) -> list[str]:
        variables = {"LAUNCH": "echo", "SHARDS": "/somewhere", "NAME": "mine", "OUT": "/runs/one"}
        return passed(f"bash {script} {arguments}", **variables).split()

    part, *overrides = shown("pretrain/launch/backbone.sh", "model=small")
    assert part == "pretrain"
    backbone = parse(compose(part, overrides), PretrainConfig)
    small = compose("pretrain", ["kind=bold", "model=small"])["model"]
    assert backbone.model.encoder.width == small["encoder"]["width"]
    assert backbone.register.names["bold"] == "mine"
    part, *overrides = shown("finetune/launch/adhd.sh", "train.steps=7")
    assert part == "finetune"
    classifier = parse(compose(part, overrides), FinetuneConfig)
    assert classifier.train.steps == 7
    assert classifier.encoder == "models:/callosum-bold@candidate"
    assert classifier.register.name == "mine"
    part, *overrides = shown("finetune/launch/rdm.sh", "task.measure=euclidean")
    rdm = parse(compose(part, overrides), FinetuneConfig)
    assert (rdm.encoder, rdm.task["region"], rdm.task["measure"]) == (
        "openai/clip-vit-base-patch32",
        "all",
        "euclidean",
    )
    assert rdm.register.name == "mine"
    for found in (backbone, classifier, rdm):
        assert (found.run.folder, found.run.name, found.shards) == ("/runs/one", "mine", "/somewhere")


def test_an_alignment_names_both_sets_and_drops_the_network_of_a_registered_encoder() -> None:
    variables = {"LAUNCH": "echo", "SHARDS": "/t1", "FUNCTION": "/rest", "FUNCTION_ENCODER": "models:/bold@candidate"}
    part, *overrides = passed("bash finetune/launch/alignment.sh train.steps=7", **variables).split()
    config = parse(compose(part, overrides), FinetuneConfig)
    assert (config.shards, config.encoder, config.train.steps) == ("/t1", "scratch", 7)
    function = parse_task(config.task, Config).function
    assert (function.shards, function.encoder, function.network) == ("/rest", "models:/bold@candidate", None)


@pytest.mark.faults  # minutes: every stage is a process of its own
def test_the_masking_experiment_and_both_stages_run_on_a_small_phantom_and_resume_where_they_stopped(
    tmp_path: Path,
) -> None:
    scans, shards = tmp_path / "bids", tmp_path / "shards"
    tracking = f"sqlite:///{tmp_path}/mlflow.db"
    passed(f"python -m data_sharding.phantom out={scans} num_subjects=40 num_frames=48 spacing_mm=12 t1_spacing_mm=12")
    passed(
        f"python -m data_sharding source.root={scans} out={shards} space=mni12 dataset=phantom_small cluster=inline "
        "acceptance.min_coverage=0.2"
    )
    pretrain = (
        f"experiment=quick_bold {INLINE} windows.bold.patch_voxels=2 train.steps=4 run.scratch={tmp_path}/scratch"
    )
    finetune = f"experiment=quick_adhd {INLINE} bootstrap.num_resamples=100 run.scratch={tmp_path}/scratch"
    variables = {"SHARDS": str(shards), "TRACKING": tracking}
    stages = {
        **variables,
        "OUT": f"{tmp_path}/masks",
        "ARMS": "random region",
        "SEEDS": "0 1",
        "FINETUNE_SEEDS": "0",
        "PRETRAIN": f"{pretrain} train.checkpoint.every_steps=4 train.evaluation.every_steps=4",
        "FINETUNE": finetune,
    }
    first = passed("bash pretrain/launch/region_vs_random.sh", **stages)
    table = (tmp_path / "masks/compare/comparison.md").read_text()
    assert table in first
    assert table.count("| region - random |") == 2
    again = passed("bash pretrain/launch/region_vs_random.sh", **stages)
    assert "step " not in again  # nothing is trained a second time
    assert [line for line in again.splitlines() if " finished" in line] == ["4 runs, 4 finished", "8 runs, 8 finished"]
    assert table in again

    passed(f"bash finetune/launch/adhd.sh {finetune}", **variables, OUT=f"{tmp_path}/adhd", NAME="a",
           ENCODER="models:/masks-region-1@candidate")  # fmt: skip
    assert (tmp_path / "adhd/report.html").exists()
    passed(f"bash pretrain/launch/backbone.sh {pretrain}", **variables, OUT=f"{tmp_path}/bold")
    assert (tmp_path / "bold/bundle/model.yaml").exists()
