"""A joint run: several sets of any kind and resolution, one trunk, one command; resumable on any number of ranks."""

import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from brain_models import bundle
from brain_models.served import ServedModel
from cluster.ray.launch import run_on_workers
from configs.entry import compose
from configs.parse import parse
from data_sharding.config import ShardingConfig
from data_sharding.phantoms.study.config import PhantomConfig
from data_sharding.phantoms.study.write import write_phantom
from data_sharding.read.joint import JointSource, sets_of_steps
from data_sharding.read.shard_set import split_conflicts
from data_sharding.write.build import build
from pretrain.masked.config import PretrainConfig
from pretrain.masked.planning import count, plan, state_bytes, steps_by_set
from pretrain.masked.sets import build_task, open_sets, open_source
from pretrain.masked.study import train
from pretrain.masked.validation import validate
from tests.pretrain.test_pretrain_training import TINY
from training.collectives import Process
from training.engine.engines import checkpoint_bytes

FAULT_SECTION = "Joint runs of several ranks"

BATCH_SIZE = 6
SPLITS = ["splits.rule=ranked", "splits.num_validation=1", "splits.num_test=1"]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same six people at 12 mm (BOLD and T1) and at 6 mm."""
    folder = tmp_path_factory.mktemp("joint")
    overrides = [f"out={folder / 'bids'}", "num_subjects=6", "num_frames=16", "spacing_mm=12.0", "t1_spacing_mm=12.0"]
    write_phantom(parse(compose("data_sharding.phantom", [*overrides, "num_processes=1"]), PhantomConfig))
    found = {}
    for space in ("mni12", "mni6"):
        found[space] = str(folder / space)
        overrides = [f"source.root={folder / 'bids'}", f"out={found[space]}", f"space={space}", "cluster=inline"]
        build(parse(compose("data_sharding", [*overrides, *SPLITS, "cluster.num_workers=1"]), ShardingConfig))
    return found


def config_of(places: dict[str, str], folder: Path, *overrides: str, sets: str | None = None) -> PretrainConfig:
    coarse, fine = places["mni12"], places["mni6"]
    joint = (
        f"{{rest: {{kind: bold, shards: {coarse}, weight: 2}}, fine: {{kind: bold, shards: {fine}, weight: 1}}, "
        f"anat: {{kind: t1, shards: {coarse}, weight: 1}}}}"
    )
    window = "{window_frames: 4, tubelet_frames: 2, patch_voxels: 6}"
    small = [
        f"sets={sets or joint}",
        f"+windows.fine={window}",
        "windows.bold={window_frames: 4, tubelet_frames: 2, patch_voxels: 3}",
        "windows.t1.patch_voxels=3",
        f"run.folder={folder / 'run'}",
        f"run.scratch={folder / 'scratch'}",
        *TINY,
        f"data.batch_size={BATCH_SIZE}",
        "data.micro_batch_size=3",
        "data.seed=2",
        "baselines.fit_samples=12",
        "min_mean_subjects=2",
        "train.steps=8",
        "train.optimizer.learning_rate=0.002",
        "train.schedule.warmup_steps=1",
        "train.checkpoint.every_steps=3",
        "train.evaluation.every_steps=8",
        "train.evaluation.subset=4",
        "train.tracking.every_steps=1",
    ]
    return parse(compose("pretrain", [*small, *overrides]), PretrainConfig)


def test_the_set_of_a_step_depends_on_seed_and_step_only_and_follows_the_weights() -> None:
    weights = {"rest": 0.7, "anat": 0.3}
    drawn = sets_of_steps(weights, seed=3, first_step=0, num_steps=4000)
    assert sets_of_steps(weights, seed=3, first_step=1234, num_steps=50) == drawn[1234:1284]
    assert sets_of_steps({"rest": 7, "anat": 3}, seed=3, first_step=0, num_steps=4000) == drawn
    assert sets_of_steps(weights, seed=4, first_step=0, num_steps=4000) != drawn
    assert Counter(drawn)["rest"] / 4000 == pytest.approx(0.7, abs=0.03)
    together = sum(one == other == "anat" for one, other in itertools.pairwise(drawn)) / 3999
    assert together == pytest.approx(0.09, abs=0.02)


def samples_of(source: JointSource, state: dict, num_steps: int) -> tuple[list[tuple[str, list]], dict]:
    """(set, rows that count) of each step of this rank, and the state after them."""
    steps, found = source.steps(state), []
    for _ in range(num_steps):
        batches, state = next(steps)
        assert len({batch.set_name for batch in batches}) == 1
        rows = [
            (scan_id, first, seed)
            for batch in batches
            for scan_id, first, seed, weight in zip(
                batch.scan_ids, batch.first_frame, batch.sample_seed.tolist(), batch.weight.tolist(), strict=True
            )
            if weight > 0
        ]
        found.append((batches[0].set_name, rows))
    steps.close()  # type: ignore[attr-defined]
    return found, state


def test_resumed_anywhere_on_other_ranks_a_joint_run_sees_the_samples_of_the_uninterrupted_one(
    places: dict[str, str], tmp_path: Path
) -> None:
    config = config_of(places, tmp_path)
    sets = open_sets(config)
    one = open_source(config, sets, Process(0, 1))
    assert isinstance(one, JointSource)
    whole, end = samples_of(one, one.initial_state(), 9)
    assert {name for name, _ in whole} == {"rest", "fine", "anat"}
    ranks = [open_source(config, sets, Process(rank, 3)) for rank in range(3)]
    firsts, states = zip(*(samples_of(rank, rank.initial_state(), 4) for rank in ranks), strict=True)
    for step in range(4):
        joined = [row for first in firsts for row in first[step][1]]
        assert (firsts[0][step][0], joined) == whole[step]
    state = json.loads(json.dumps(ranks[0].merge_states(list(states))))
    assert state == samples_of(one, one.initial_state(), 4)[1]
    rest, _ = samples_of(open_source(config, sets, Process(0, 1)), state, 5)
    assert rest == whole[4:]
    pair = [open_source(config, sets, Process(rank, 2)) for rank in range(2)]
    for num_steps in (1, 5):  # after one step, two of the sets are where the stop was
        reached = pair[0].merge_states([samples_of(rank, state, num_steps)[1] for rank in pair])
        assert reached == samples_of(one, state, num_steps)[1]
    assert reached == end


def test_two_resolutions_share_the_trunk_and_every_stem_has_a_gradient_in_every_step(
    places: dict[str, str], tmp_path: Path
) -> None:
    config = config_of(places, tmp_path)
    sets = open_sets(config)
    task = build_task(config, sets)
    assert list(task.encoder.stems)[0::2] == ["bold", "t1"]
    second = list(task.encoder.stems)[1]
    assert second.startswith("bold_")
    assert task.encoder.stem("bold").num_features == 27 * 2
    assert task.encoder.stem(second).num_features == 216 * 2
    source = open_source(config, sets, Process(0, 1))
    batch = next(source.evaluation("train", limit=4)).to("cpu")
    losses = task(batch)
    losses["loss"].backward()
    assert losses.keys() == {"loss", "loss/rest"}
    assert float(losses["loss"].detach()) == float(losses["loss/rest"])
    assert all(parameter.grad is not None for parameter in task.parameters())
    used = task.decoder.predict["bold"].weight.grad
    assert used is not None
    assert float(used.abs().max()) > 0
    for idle in (task.encoder.stem(second).project, task.decoder.predict["t1"]):
        assert not any(bool(parameter.grad.any()) for parameter in idle.parameters())


def test_one_command_trains_all_sets_and_what_it_leaves_serves_each_of_them(
    places: dict[str, str], tmp_path: Path
) -> None:
    config = config_of(places, tmp_path)
    assert validate(config) == []
    summary = train(config)
    report = summary["reconstruction"]["validation"]  # type: ignore[index]
    assert report.keys() == {"rest", "fine", "anat"}
    assert all({"r2", "ridge", "groups", "regions"} <= part.keys() for part in report.values())
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = Counter(row["key"] for row in rows if row["key"].startswith("train/loss"))
    expected = sets_of_steps({"rest": 2, "fine": 1, "anat": 1}, seed=2, first_step=0, num_steps=8)
    assert steps == {"train/loss": 8, **{f"train/loss/{name}": count for name, count in Counter(expected).items()}}
    assert steps_by_set(config) == {name: expected.count(name) for name in ("rest", "fine", "anat")}
    found = {row["key"]: row["value"] for row in rows}
    losses = [found[f"validation/{name}/loss"] for name in ("rest", "fine", "anat")]
    assert found["validation/loss"] == pytest.approx(np.dot(losses, [0.5, 0.25, 0.25]), rel=1e-6)
    assert "validation/fine/r2/ridge" in found
    check_bundle(tmp_path / "run" / "bundle", config)


@pytest.mark.faults
@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_a_joint_run_of_two_ranks_leaves_what_a_plain_one_does(
    places: dict[str, str], tmp_path: Path, engine: str
) -> None:
    train(config_of(places, tmp_path / "plain", "train.steps=2"))
    workers = [f"engine={engine}", "cluster=local", "cluster.num_workers=2"]
    config = config_of(places, tmp_path / "zero", "train.steps=2", *workers)
    run_on_workers(train, config, cluster=config.cluster, name=engine)
    saved = [path for path in (tmp_path / "zero" / "run" / "checkpoints").rglob("step-00000002*/**/*.pt")]
    planned = checkpoint_bytes(build_task(config, open_sets(config)), config.train.engine, num_ranks=2)
    assert sum(path.stat().st_size for path in saved) == pytest.approx(planned, rel=0.1)
    plain, divided = (
        bundle.load(tmp_path / name / "run" / "bundle").encoder.state_dict() for name in ("plain", "zero")
    )
    for name, value in plain.items():
        torch.testing.assert_close(divided[name], value, rtol=1e-4, atol=1e-5)


def check_bundle(folder: Path, config: PretrainConfig) -> None:
    loaded = bundle.load(folder)
    sets = open_sets(config)
    fine = sets["fine"].geometry.space
    served = ServedModel()
    served.bundle = loaded
    packed = {name: sets[name].geometry.space.num_voxels for name in ("rest", "fine")}
    generator = np.random.default_rng(0)
    scans = [generator.integers(-60, 60, size=(4, voxels)).astype(np.int8) for voxels in packed.values()]
    table = pd.DataFrame({"bold": scans, "repetition_time_s": 2.0})
    embeddings = served.predict(None, table)
    assert list(embeddings)[:2] == ["subject", "session"]
    values = embeddings.drop(columns=["subject", "session"]).to_numpy(dtype=float)
    assert values.shape == (2, 32)
    assert not np.allclose(values[0], values[1])
    assert loaded.in_space("bold", sets["rest"].geometry.space).stems["bold"].space is not fine
    narrowed = loaded.in_space("bold", fine)
    assert narrowed.stems["bold"].space.fingerprint == fine.fingerprint
    assert narrowed.stems["bold"].layout.patch_voxels == 6
    assert narrowed.encoder.stem("bold").num_features == 216 * 2


def test_a_run_that_stopped_resumes_to_the_same_losses(places: dict[str, str], tmp_path: Path) -> None:
    def losses(folder: Path) -> dict[int, float]:
        rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        return {row["step"]: row["value"] for row in rows if row["key"] == "train/loss"}

    train(config_of(places, tmp_path / "whole", "train.schedule.kind=constant"))
    short = config_of(places, tmp_path / "short", "train.schedule.kind=constant", "train.steps=5")
    train(short)
    (checkpoint,) = (tmp_path / "short" / "run" / "checkpoints").glob("step-00000005-*")
    start = f"train.start.checkpoint={checkpoint}"
    summary = train(config_of(places, tmp_path / "rest", "train.schedule.kind=constant", start))
    assert summary["start"] == "named"
    whole, rest = losses(tmp_path / "whole"), losses(tmp_path / "rest")
    assert list(rest) == [6, 7, 8]
    assert {step: whole[step] for step in rest} == rest


def test_a_stem_of_a_new_resolution_starts_as_a_registered_one_resampled(
    places: dict[str, str], tmp_path: Path
) -> None:
    only = "{rest: {kind: bold, shards: %s, weight: 1}}"
    train(config_of(places, tmp_path, "train.steps=2", sets=only % places["mni12"]))
    both = config_of(places, tmp_path)
    task = build_task(both, open_sets(both))
    task.load_registered(tmp_path / "run" / "bundle")
    theirs = bundle.load(tmp_path / "run" / "bundle").encoder
    assert torch.equal(task.encoder.blocks[0].mlp[0].weight, theirs.blocks[0].mlp[0].weight)
    old, same, new = theirs.stem("bold"), task.encoder.stem("bold"), task.encoder.stem(task.set_named("fine").stem_name)
    assert torch.equal(same.project.weight, old.project.weight)
    flat = old.project(torch.ones(1, old.num_features))
    torch.testing.assert_close(new.project(torch.ones(1, new.num_features)), flat, rtol=1e-4, atol=1e-5)


def test_a_subject_trained_on_in_one_set_and_held_out_in_another_is_refused_by_name(
    places: dict[str, str], tmp_path: Path
) -> None:
    tables = {
        "one": pd.DataFrame({"split": ["train", "test", "train"]}, index=["ann", "bob", "cat"]),
        "two": pd.DataFrame({"split": ["test", "test", "train"]}, index=["ann", "bob", "dan"]),
    }
    (problem,) = split_conflicts(tables)
    assert "sets one and two split 1 of 2 shared subjects differently: ann (train in one, test in two)" in problem
    assert split_conflicts({"one": tables["one"], "same": tables["one"]}) == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["kind=bold"], "kind or shards are given as well"),
        (["sets.anat.weight=0"], "sets.anat.weight: 0.0; must be above 0"),
        (["+sets.t1={kind: bold, shards: a, weight: 1}"], "sets.t1: use small letters, digits and _"),
        (["train.start.checkpoint=nowhere/step-1"], "nowhere/step-1 has no COMMIT.json"),
        (
            ["train.start.registered=a@candidate", "tracking=sqlite:///nowhere.db"],
            "there is no file nowhere.db",
        ),
        (["+windows.fin=${windows.fine}"], "windows.fin: no set has this name; they are rest, fine, anat"),
        (["windows.fine.patch_voxels=0"], "windows.fine.patch_voxels: 0; must be above 0"),
        (["masking=future"], "set anat: masking.kind: 'future' needs windows of at least 2 tubelets"),
    ],
)
def test_validate_names_the_set_that_does_not_fit(
    places: dict[str, str], tmp_path: Path, overrides: list[str], message: str
) -> None:
    assert message in "\n".join(validate(config_of(places, tmp_path, *overrides)))


def test_the_plan_has_the_steps_and_bytes_of_each_set_that_a_run_then_reads(
    places: dict[str, str], tmp_path: Path
) -> None:
    config = config_of(places, tmp_path)
    lines = {key.strip(): text for key, text in (line.split("  ", 1) for line in plan(config).splitlines())}
    sets = open_sets(config)
    source = open_source(config, sets, Process(0, 1))
    num_bytes, num_steps = Counter(), Counter()
    for batches, _ in itertools.islice(source.steps(source.initial_state()), config.train.steps):
        num_steps[batches[0].set_name] += 1
        for batch in batches:
            num_bytes[batch.set_name] += int(batch.weight.sum()) * batch.stored[0].nbytes  # type: ignore[attr-defined]
    for name in ("rest", "fine", "anat"):
        assert lines[f"{name}: bytes read"].strip().startswith(f"{num_bytes[name] / 1000:.1f} kB (")
        drawn = num_steps[name] * BATCH_SIZE
        assert lines[f"{name}: samples drawn"].strip().startswith(f"{drawn:,} in {num_steps[name]:,} steps")
    assert lines["weights and optimiser"].count("ZeRO") == 4
    assert "B when recomputed (3 samples, fp32)" in lines["activations"]
    assert lines["fine: majority reaches"].strip().startswith("brain 1.000, frontal 0.")


def test_a_checkpoint_is_as_large_as_planned(places: dict[str, str], tmp_path: Path) -> None:
    config = config_of(places, tmp_path, "train.steps=1", "train.evaluation.final_splits=[]")
    train(config)
    (saved,) = (tmp_path / "run" / "checkpoints").glob("*/plain.pt")
    task = build_task(config, open_sets(config))
    planned = checkpoint_bytes(task, config.train.engine, num_ranks=1)
    assert saved.stat().st_size == pytest.approx(planned, rel=0.1)
    assert state_bytes(count(task), stage=2, num_ranks=2) == pytest.approx((4 + 2 + 6) * count(task))
