"""Spaces without an atlas: T1 cubes and surfaces are pretrained on like volumes, with pseudo-regions."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from brain_models import bundle
from configs.entry import compose
from configs.parse import parse
from data_sharding.phantoms import bids as bids_phantom
from data_sharding.phantoms import hcp_motor as hcp_phantom
from data_sharding.read.shard_set import ShardSet
from pretrain.masked.config import PretrainConfig
from pretrain.masked.sets import build_task, open_sets
from pretrain.masked.study import train
from pretrain.masked.validation import validate
from tests.helpers_sources import AS_IT_IS, set_of, write_phantom
from tests.pretrain.test_pretrain_training import TINY


def one_signal(num_vertices: int, num_frames: int, seed: tuple[object, ...]) -> np.ndarray:
    """[time, vertex]: slow waves that all vertices share, so that visible ones tell what hidden ones do, and noise."""
    numbers = np.random.default_rng(len(str(seed)) + num_frames)
    waves = np.sin(np.arange(num_frames)[:, None] * [0.15, 0.31] + numbers.uniform(0, 6, 2)).sum(axis=1)
    return (1000 + 20 * waves[:, None] + numbers.normal(0, 2, (num_frames, num_vertices))).astype(np.float32)


@pytest.fixture(autouse=True)
def one_signal_in_every_surface_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for phantom in (hcp_phantom, bids_phantom):
        monkeypatch.setattr(phantom, "vertex_values", one_signal)


def hcp_motor(folder: Path) -> ShardSet:
    """The phantom's somatomotor vertices of fs_LR 32k."""
    root = write_phantom("hcp_motor", folder / "hcp", num_subjects=3)
    sides = ",".join(f"{root}/group/{side}.midthickness.32k_fs_LR.surf.gii" for side in "LR")
    space = [f"space.surfaces=[{sides}]", f"space.vertices=[{root}/group/yeo7.dlabel.nii]", "space.labels=[2]"]
    splits = ["splits.rule=ranked", "splits.num_validation=1", "splits.num_test=1"]
    return set_of(folder / "set", "dataset=hcp_motor", f"source.root={root}", *space, *splits)


def fsaverage5(folder: Path) -> ShardSet:
    """One subject's run on all 20,484 vertices of nilearn's meshes."""
    root = write_phantom("bids", folder / "bids", num_subjects=1)
    subject = ["source.kinds=[bold]", "source.subjects=['01']", "acceptance.max_refused_fraction=1.0"]
    overrides = ["dataset=bids", f"source.root={root}", "space=fsaverage5", "atlas=null", "splits.rule=none", *subject]
    return set_of(folder / "set", *overrides, *AS_IT_IS)


def t1_cube(folder: Path) -> ShardSet:
    """T1w scans in a cube of 16 voxels of 16 mm around the head."""
    root = write_phantom("mica_mics", folder / "mica", num_subjects=3)
    overrides = ["dataset=mica_mics", f"source.root={root}", "source.kinds=[t1]", "space=t1_cube128", "atlas=null"]
    overrides += ["space.edge_voxels=16", "space.spacing_mm=16", "acceptance.max_refused_fraction=0.5"]
    return set_of(folder / "set", *overrides, "splits.num_validation=1", "splits.num_test=1")


SETS = {"hcp_motor": hcp_motor, "fsaverage5": fsaverage5, "t1_cube": t1_cube}
PATCH_VOXELS = {"hcp_motor": 4, "fsaverage5": 12, "t1_cube": 4}


@pytest.mark.parametrize("name", list(SETS))
def test_a_space_without_an_atlas_learns_hides_its_budget_and_its_bundle_loads(name: str, tmp_path: Path) -> None:
    shard_set = SETS[name](tmp_path)
    kind = "t1" if name == "t1_cube" else "bold"
    frames = [f"windows.{kind}.window_frames=4", f"windows.{kind}.tubelet_frames=2"] if kind == "bold" else []
    held_out = "train" if name == "fsaverage5" else "validation"
    overrides = [f"kind={kind}", f"shards={tmp_path / 'set'}", "atlas=null", f"run.folder={tmp_path / 'run'}"]
    overrides += [f"run.scratch={tmp_path / 'scratch'}", f"windows.{kind}.patch_voxels={PATCH_VOXELS[name]}", *TINY]
    overrides += ["train.steps=12", "train.schedule.warmup_steps=1", "train.evaluation.every_steps=12", *frames]
    overrides += [f"train.evaluation.split={held_out}", f"train.evaluation.final_splits=[{held_out}]"]
    overrides += ["train.evaluation.subset=8", "data.batch_size=8", "data.micro_batch_size=4", "min_mean_subjects=2"]
    overrides += ["train.optimizer.learning_rate=0.005", "baselines.fit_samples=8", "report.maps.num_samples=2"]
    config = parse(compose("pretrain", overrides), PretrainConfig)
    assert validate(config) == []

    opened = open_sets(config)
    geometry, masker = opened[kind].geometry, build_task(config, opened).set_named(kind).masker
    assert shard_set.atlases == {}
    assert set(geometry.atlas.names.values()) == {f"pseudo {number}" for number in geometry.atlas.region_ids}
    assert 50 <= len(geometry.atlas.region_ids) <= 200
    assert masker.num_hidden == round(0.5 * geometry.layout.num_patches) * geometry.num_tubelets
    assert masker.choose(torch.arange(3)).hidden.shape == (3, masker.num_hidden)
    sides = geometry.space.hemispheres
    if sides is not None:
        one_side = [len(set(sides[patch[patch < len(sides)]])) for patch in geometry.layout.gather]
        assert set(one_side) == {1}

    summary = train(config)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["value"] for row in rows if row["key"] in ("validation/loss", "train_split/loss")]
    assert losses[-1] < 0.95 * losses[0]
    scores = summary["reconstruction"][held_out]  # type: ignore[index]
    assert set(scores["regions"]) <= set(geometry.atlas.names.values())
    assert scores["groups"] == {}
    loaded = bundle.load(tmp_path / "run" / "bundle")
    assert loaded.stems[kind].layout.fingerprint == geometry.layout.fingerprint
    assert loaded.stems[kind].atlas.names == geometry.atlas.names
    maps = {path.name for path in (tmp_path / "run" / "report").iterdir()}
    expected = f"{kind}_{held_out}_r2.nii.gz" if kind == "t1" else f"{kind}_{held_out}_maps.npz"
    assert expected in maps
