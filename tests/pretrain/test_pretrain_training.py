import csv
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from brain_models import bundle
from cluster.storage.stores import LocalStore
from configs.entry import compose
from configs.parse import parse
from data_sharding.config import ShardingConfig
from data_sharding.phantoms.study.config import PhantomConfig
from data_sharding.phantoms.study.write import write_phantom
from data_sharding.read.fetch import Fetched, Fetcher, WindowRead
from data_sharding.read.reader import BatchSource, ShardSet, open_set
from data_sharding.write.build import build
from pretrain.errors import PretrainError
from pretrain.masked import preparation
from pretrain.masked.analysis import analyse_again
from pretrain.masked.config import PretrainConfig
from pretrain.masked.masked_volumes import MaskedVolumes
from pretrain.masked.masking import Masker
from pretrain.masked.planning import plan
from pretrain.masked.preparation import (
    fit_voxel_statistics,
    fitted_references,
    prepare,
    scores_of_baselines,
    untrained_embedding,
)
from pretrain.masked.sets import build_task, open_sets, windows_of
from pretrain.masked.study import preparation_key, train
from pretrain.masked.validation import validate
from training.registry import models as registry
from training.registry.seen_subjects import hash_subject, keep_seen, read_seen, seen_before, write_seen

FAULT_SECTION = "What commits say was read"

TINY = [  # a model that trains in seconds, in this process
    "engine=plain",
    "cluster=inline",
    "cluster.num_workers=1",
    "model.encoder.width=32",
    "model.decoder.width=32",
    "model.encoder.depth=1",
    "model.decoder.depth=1",
    "data.num_workers=0",
    "tracking=null",
    "report.maps.num_samples=0",
]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("pretrain")
    overrides = [f"out={folder / 'bids'}", "num_subjects=14", "num_frames=48", "spacing_mm=12.0", "t1_spacing_mm=12.0"]
    write_phantom(parse(compose("data_sharding.phantom", [*overrides, "num_processes=1"]), PhantomConfig))
    overrides = [f"source.root={folder / 'bids'}", f"out={folder / 'set'}", "space=mni12", "cluster=inline"]
    overrides += ["cluster.num_workers=1", "splits.rule=ranked", "splits.num_validation=3", "splits.num_test=2"]
    build(parse(compose("data_sharding", overrides), ShardingConfig))
    return str(folder / "set")


def config_of(shards: str, folder: Path, *overrides: str, kind: str = "bold") -> PretrainConfig:
    """A tiny model for a 12 mm set, in this process."""
    return parse(compose("pretrain", [*overrides_of(shards, folder, kind), *overrides]), PretrainConfig)


def overrides_of(shards: str, folder: Path, kind: str) -> list[str]:
    return [
        f"experiment=demo_{kind}",
        f"shards={shards}",
        f"run.folder={folder / 'run'}",
        f"run.scratch={folder / 'scratch'}",
        f"windows.{kind}.patch_voxels=3",
        *TINY,
        "baselines.fit_samples=64",
        "train.steps=60",
        "train.schedule.warmup_steps=5",
        "train.evaluation.every_steps=10",
    ]


def validation_losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [row["value"] for row in rows if row["key"] == "validation/loss"]


def test_a_few_subjects_mean_is_not_taken_for_a_population_mean(shards: str, tmp_path: Path) -> None:
    """One subject's mean T1 is that T1: nothing would be left to learn."""
    for overrides, has_mean in ((["min_mean_subjects=9"], True), (["min_mean_subjects=10"], False)):
        config = config_of(shards, tmp_path, *overrides, kind="t1")
        sets = open_sets(config)
        task = build_task(config, sets)
        fit_voxel_statistics(task, config, sets)
        assert bool(task.encoder.stem("t1").voxel_offset.any()) == has_mean


def fitted(config: PretrainConfig) -> dict[str, object]:
    """What a rank's task knows before its first step, and how many windows of the training split it has read for it."""
    num_read, fetch = [0], Fetcher.fetch

    def counted(self: Fetcher, reads: list[WindowRead]) -> Fetched:
        num_read[0] += len(reads)
        return fetch(self, reads)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Fetcher, "fetch", counted)
        sets = open_sets(config)
        task = build_task(config, sets)
        fit_voxel_statistics(task, config, sets)
        references = fitted_references(task, config, sets["bold"])
    stem, scores = task.encoder.stem("bold"), scores_of_baselines(task, config, sets["bold"])
    untrained = untrained_embedding(task, config, sets["bold"])
    assert references.ridge is not None
    return {
        "offset": stem.voxel_offset,
        "scale": stem.voxel_scale,
        "drift": references.global_drift.weights(),
        "patches": references.ridge.patch_moments,
        "voxels": references.ridge.voxel_moments,
        "penalty": torch.tensor(references.penalty),
        "embedding": torch.tensor(list(untrained.values())),
        "sample_seed": scores.sample_seed,
        **{f"error of {name}": errors for name, errors in scores.errors.items()},
        "num_read": num_read[0],
    }


def _fit_as_rank(config: PretrainConfig, rank: int, folder: Path) -> None:
    store = torch.distributed.FileStore(str(folder / "meeting"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.save(fitted(config), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("num_samples", [48, 1])
def test_two_ranks_fit_the_baselines_of_one_and_each_reads_only_its_share(
    shards: str, tmp_path: Path, num_samples: int
) -> None:
    config = config_of(shards, tmp_path, f"baselines.fit_samples={num_samples}", "data.micro_batch_size=4")
    alone = fitted(config)
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_fit_as_rank, args=(config, rank, tmp_path)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name in first.keys() - {"num_read"}:
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], alone[name], rtol=1e-4, atol=1e-5)
    if num_samples == 48:
        assert first["num_read"] == second["num_read"] == alone["num_read"] / 2


def test_a_resumed_run_reads_back_what_it_prepared_and_another_configuration_prepares_anew(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(shards, tmp_path, "train.evaluation.subset=4")
    sets = open_sets(config)

    def prepared(key: str) -> MaskedVolumes:
        task = build_task(config, sets)
        prepare(task, config, sets, key=key)
        return task

    first = prepared("one")
    record = json.loads((tmp_path / "run" / "baselines.json").read_text())
    with monkeypatch.context() as without:
        without.setattr(preparation, "compute", None)
        again = prepared("one")
    mine, theirs = first.set_named("bold").baselines, again.set_named("bold").baselines
    assert list(mine.errors) == list(theirs.errors) == ["neighbour", "global_drift", "ridge"]
    assert torch.equal(mine.sample_seed, theirs.sample_seed)
    assert all(torch.equal(errors, theirs.errors[name]) for name, errors in mine.errors.items())
    assert torch.equal(first.encoder.stem("bold").voxel_scale, again.encoder.stem("bold").voxel_scale)
    assert torch.equal(first.set_named("bold").training_mean, again.set_named("bold").training_mean)
    assert first.sentinels == again.sentinels
    prepared("another")
    assert "baselines.json is of another configuration or set; computing it again" in caplog.text
    kept = json.loads((tmp_path / "run" / "baselines.json").read_text())
    assert kept == record | {"key": "another"}
    tensors = tmp_path / "run" / "baselines.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-4] + b"four")
    with pytest.raises(PretrainError, match=r"is not the file that baselines.json was written with; delete both"):
        prepared("another")


def test_the_key_of_a_preparation_has_configuration_set_and_sentinels(shards: str, tmp_path: Path) -> None:
    config = config_of(shards, tmp_path)
    others = ["masking.hidden_share=0.25", "baselines.fit_samples=32", "report.sentinels.tokens_per_sample=2"]
    keys = {preparation_key(config_of(shards, tmp_path, other), "set") for other in [*others, "train.seed=7"]}
    assert len(keys | {preparation_key(config, "set"), preparation_key(config, "other")}) == 6
    assert preparation_key(config_of(shards, tmp_path, "report.maps.num_samples=3"), "set") == preparation_key(
        config, "set"
    )


@pytest.mark.parametrize("kind", ["bold", "t1"])
def test_a_short_run_lowers_the_validation_loss_below_the_mean_and_its_bundle_loads(
    shards: str, tmp_path: Path, kind: str
) -> None:
    config = config_of(shards, tmp_path, kind=kind)
    summary = train(config)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == json.loads(json.dumps(summary))
    assert [path for path in Path(config.run.scratch).rglob("*") if path.suffix == ".safetensors"] == []
    report = summary["reconstruction"]["validation"]  # type: ignore[index]
    losses = validation_losses(tmp_path)
    assert losses[-1] < losses[0]
    assert report["r2"] > 0
    assert summary["models"]["model"][f"r2_{kind}"]["value"] == report["r2"]  # type: ignore[index]
    assert list(summary["models"]) == ["model", "neighbour", "global_drift", "ridge"]  # type: ignore[call-overload]
    assert f"Hidden voxels of {kind}, split validation, are predicted with R² " in str(summary["verdict"])
    assert report["mean"] == 0
    assert {"neighbour", "ridge", "groups", "regions"} <= report.keys()
    loaded = bundle.load(tmp_path / "run" / "bundle")
    assert {"low", "high", "global_drift", "gain"} <= report.keys()
    lines = list(csv.DictReader((tmp_path / "run" / "report" / "reconstruction.csv").read_text().splitlines()))
    assert float(lines[0]["r2"]) == pytest.approx(report["r2"], abs=1e-6)
    assert {line["alignment"] for line in lines} == {"given"}
    stem = loaded.encoder.stem(config.kind)
    assert float(stem.voxel_offset.abs().max()) > 0
    assert loaded.stems[config.kind].window_frames == config.window_of(kind).window_frames


def test_a_finished_run_is_looked_at_again_from_its_weights(shards: str, tmp_path: Path) -> None:
    few = ["report.probes.num_samples=24", "report.probes.num_folds=3", "report.probes.num_permutations=3"]
    few += ["report.contribution.num_samples=3", "report.contribution.num_contexts=2"]
    few += ["report.contribution.num_null_sets=2", "report.contribution.num_permutations=19"]
    config = config_of(shards, tmp_path, "train.steps=2", "train.evaluation.every_steps=2", *few)
    with pytest.raises(PretrainError, match=r"holds no metrics.json: not a finished run"):
        analyse_again(config)
    plain = config_of(shards, tmp_path, "train.steps=2", "train.evaluation.every_steps=2")
    assert set(train(plain)["report"]["bold"]) == {"seconds"}  # type: ignore[index]
    same = ["train.steps=2", "train.evaluation.every_steps=2", *few, "report.maps.num_samples=4"]
    before = (tmp_path / "run" / "metrics.json").read_bytes()
    other = config_of(shards, tmp_path, *same, "train.seed=7", "masking.hidden_share=0.25")
    with pytest.raises(PretrainError, match=r"masking.hidden_share: .* there, 0.25 here\n  - train.seed: 0 there, 7 "):
        analyse_again(other)
    assert (tmp_path / "run" / "metrics.json").read_bytes() == before
    analyse_again(config_of(shards, tmp_path, *same))
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())["report"]["bold"]
    assert found["maps"]["validation"]["windows"] == 4
    assert found["contribution"]["windows"] == 3
    assert found["probes"]["trained"].keys() == {"site", "repetition_time"}
    assert found["probes"]["same_question"]  # of the phantom's sites, each has its own repetition time
    names = {path.name for path in (tmp_path / "run" / "report").iterdir()}
    assert {"reconstruction.csv", "bold_validation_r2.nii.gz", "bold_validation_maps.png"} <= names
    assert {"bold_contribution.csv", "bold_contribution.png"} <= names
    summary = json.loads((tmp_path / "run" / "metrics.json").read_text())
    (tmp_path / "run" / "metrics.json").write_text(json.dumps(summary | {"fingerprint": "0" * 64}))
    with pytest.raises(PretrainError, match=r"was trained on the set 000000000000, what is there now is"):
        analyse_again(config_of(shards, tmp_path, *same))


def test_a_registered_backbone_is_pulled_and_training_can_start_from_it(shards: str, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    overrides = ["train.steps=6", f"tracking={uri}", "train.evaluation.subset=4"]
    summary = train(config_of(shards, tmp_path, *overrides))
    assert summary["registered"] == ["callosum-bold@candidate"]
    logged = MlflowClient(tracking_uri=uri).list_artifacts(str(summary["mlflow_run_id"]), "report")
    assert [file.path for file in logged] == ["report/reconstruction.csv"]
    encoder = bundle.load(registry.pull("callosum-bold@candidate", tmp_path / "pulled", uri=uri)).encoder
    tags = registry.version_tags("callosum-bold@candidate", uri=uri)
    assert tags["callosum.set_fingerprint"] == open_set(shards).fingerprint
    again = config_of(shards, tmp_path / "again", *overrides)
    task = build_task(again, open_sets(again))
    task.load_registered(tmp_path / "run" / "bundle")
    theirs = encoder.state_dict()
    assert all(torch.equal(values, theirs[name]) for name, values in task.encoder.state_dict().items())


def test_a_backbone_has_seen_whom_the_weights_it_started_from_have_seen(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after a stop, and through a commit of a run that started so."""
    held_out = open_set(shards).runs("bold", ["validation"])["subject"].iloc[0]
    started_from = tmp_path / "started_from"
    overrides = ["train.steps=2", "train.schedule.warmup_steps=1", "train.evaluation.subset=4"]
    train(config_of(shards, tmp_path / "first", *overrides))
    shutil.copytree(tmp_path / "first" / "run" / "bundle", started_from)
    write_seen(started_from, ["sub-elsewhere", held_out])
    monkeypatch.setattr(registry, "pull", lambda *_, **__: started_from)
    again = config_of(shards, tmp_path / "second", *overrides, "train.start.registered=any@one")
    numbers = train(again)
    assert numbers["overlap"] == [held_out]
    assert "The pretrained weights have seen 1 of the 5 held-out subjects" in " ".join(numbers["notices"])  # type: ignore
    shutil.rmtree(tmp_path / "second" / "run" / "bundle")
    train(again)  # resumes from its own commit
    (commit,) = (tmp_path / "second" / "run" / "checkpoints").iterdir()
    longer = ["train.steps=3", *overrides[1:], f"train.start.checkpoint={commit}"]
    train(config_of(shards, tmp_path / "third", *longer))
    for name in ("second", "third"):
        seen = read_seen(tmp_path / name / "run" / "bundle")
        assert seen is not None
        trained = open_set(shards).runs("bold", ["train"])["subject"]
        assert seen == {hash_subject(subject) for subject in [*trained, "elsewhere", held_out]}
    (started_from / "seen_subjects.txt").unlink()
    keep_seen([started_from], LocalStore(str(tmp_path)))
    assert seen_before(LocalStore(str(tmp_path))) is None


def test_a_zero_3_run_exports_the_weights_of_a_plain_one(shards: str, tmp_path: Path) -> None:
    """A process of its own, because DeepSpeed sets up torch.distributed for the whole of one."""
    train(config_of(shards, tmp_path / "plain", "train.steps=2", "train.schedule.warmup_steps=1"))
    zero = [*overrides_of(shards, tmp_path / "zero", "bold"), "train.steps=2", "train.schedule.warmup_steps=1"]
    subprocess.run([sys.executable, "-m", "pretrain", *zero, "engine=zero3"], check=True, timeout=240)
    plain, divided = (
        bundle.load(tmp_path / engine / "run" / "bundle").encoder.state_dict() for engine in ("plain", "zero")
    )
    assert plain.keys() == divided.keys()
    for name, value in plain.items():
        torch.testing.assert_close(divided[name], value, rtol=1e-5, atol=1e-6)


def test_every_arm_trains_on_the_same_number_of_hidden_tokens(shards: str, tmp_path: Path) -> None:
    budgets = set()
    for kind in ("random", "tube", "region", "future"):
        config = config_of(shards, tmp_path, f"masking={kind}", "windows.bold.tubelet_frames=2")
        masker = open_sets(config)["bold"].geometry.masker(config.masking)
        assert isinstance(masker, Masker)
        budgets.add(masker.num_hidden)
    assert len(budgets) == 1


def test_plan_says_the_samples_and_bytes_that_reading_then_finds(shards: str, tmp_path: Path) -> None:
    config = config_of(shards, tmp_path)
    shard_set = open_set(shards)
    source = BatchSource(windows_of(open_sets(config)["bold"]), config.data, rank=0, world_size=1)
    text = plan(config)
    assert f"{source.drawn.runs('train').num_samples:,} of the train split" in text
    values = 60 * 16 * 4 * shard_set.space.num_voxels
    assert re.search(rf"bytes read +{values / 1e6:.1f} MB ", text)
    task = build_task(config, open_sets(config))
    assert f"{sum(p.numel() for p in task.encoder.parameters()):,} encoder" in text
    masker = task.set_named("bold").masker
    assert f"{masker.num_tokens:,}, {masker.num_hidden:,} of them hidden" in text


def test_validate_lists_every_problem_with_its_key(shards: str, tmp_path: Path) -> None:
    assert validate(config_of(shards, tmp_path)) == []
    overrides = [
        "masking.groups=[limbic]",
        "windows.bold.window_frames=400",
        "model.decoder.width=30",
        "train.evaluation.split=dev",
        "cluster.num_workers=2",
        "weight_decay=-1",
    ]
    problems = "\n".join(validate(config_of(shards, tmp_path, *overrides)))
    assert "of the groups ['limbic'] reaches" in problems
    assert "windows.bold.window_frames: 400, but the longest run of split 'train' has 48 frames" in problems
    assert "model.decoder.width: 30 is no multiple of model.encoder.num_heads 4" in problems
    assert "no bold scan in split 'dev'" in problems
    assert "plain runs in one process" in problems
    assert "weight_decay: -1" in problems


def test_probes_are_refused_on_a_set_without_a_validation_split(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ShardSet.runs
    monkeypatch.setattr(ShardSet, "runs", lambda self, kind, splits: whole(self, kind, [*{*splits} - {"validation"}]))
    splits = ["train.evaluation.split=train", "train.evaluation.final_splits=[test]"]
    assert validate(config_of(shards, tmp_path, *splits)) == []
    (problem,) = validate(config_of(shards, tmp_path, *splits, "report.probes.num_samples=8"))
    assert "no bold scan in split 'validation'" in problem
    assert "report.probes needs train and validation" in problem


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["atlas=aal3"], r"atlas=aal3: .* holds \['template'\]; choose one of them"),
        (["shards=/nowhere"], "/nowhere holds no shard set"),
        (["masking.groups=[limbick]"], r"no group \['limbick'\] in this atlas; it has"),
        (["windows.bold.window_frames=5"], "5 is no multiple of tubelet_frames 4"),
        (["windows.bold.patch_voxels=99"], "patch_voxels 99 does not fit the .* grid of space mni12"),
        (["train.checkpoint.every_steps=1"], "train.checkpoint.every_steps: 1; must be 2 or more"),
        (
            ["report.contribution.num_samples=8", "train.evaluation.final_splits=[]"],
            "report.contribution.num_samples: 8 windows of the first final split, but .* is empty; name a split there",
        ),
        (["masking=future"], "'future' needs windows of at least 2 tubelets"),
        (["kind=t1", "windows.t1.window_frames=2"], "a T1 is one frame; set it to 1"),
    ],
)
def test_validate_says_what_is_wrong_and_what_to_do(
    shards: str, tmp_path: Path, overrides: list[str], message: str
) -> None:
    (problem,) = validate(config_of(shards, tmp_path, *overrides))
    assert re.search(message, problem)


@pytest.mark.parametrize(("model", "millions"), [("tiny", 0.43), ("small", 22), ("base", 86), ("large", 304)])
def test_model_sizes_are_what_their_headers_say(shards: str, tmp_path: Path, model: str, millions: float) -> None:
    overrides = [
        f"shards={shards}",
        f"run.folder={tmp_path}",
        "kind=bold",
        f"model={model}",
        "windows.bold.patch_voxels=3",
    ]
    config = parse(compose("pretrain", overrides), PretrainConfig)
    geometry = open_sets(config)["bold"].geometry
    with torch.device("meta"):
        encoder = bundle.BrainEncoder(config.model.encoder, {"bold": (geometry.layout, 4)})
    assert sum(parameter.numel() for parameter in encoder.parameters()) / 1e6 == pytest.approx(millions, rel=0.05)


@pytest.mark.faults
def test_a_killed_pretraining_commits_the_digests_of_an_undisturbed_one(shards: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pretrain"]
    steps = ["train.steps=12", "train.schedule.warmup_steps=1", "train.checkpoint.every_steps=2"]
    steps += ["train.checkpoint.keep_last=99", "train.evaluation.every_steps=12"]
    subprocess.run([*command, *overrides_of(shards, tmp_path / "whole", "bold"), *steps], check=True, timeout=240)
    killed = [*command, *overrides_of(shards, tmp_path / "killed", "bold"), *steps]
    process = subprocess.Popen(killed)
    while not list((tmp_path / "killed").glob("run/checkpoints/*/COMMIT.json")):
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    subprocess.run(killed, check=True, timeout=240)
    whole, resumed = (committed(tmp_path / name / "run") for name in ("whole", "killed"))
    assert len(whole) > 3
    assert resumed == whole


def committed(folder: Path) -> dict[int, str]:
    """The digest of every commit, by step."""
    commits = [json.loads(path.read_text()) for path in folder.glob("checkpoints/*/COMMIT.json")]
    return {commit["step"]: commit["data_state"]["samples_digest"] for commit in commits}
