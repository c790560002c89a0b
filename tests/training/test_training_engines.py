"""Every engine makes the same updates, on one rank and on two; frozen groups stand still until they open."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from training_toys import GLOBAL_BATCH, ToyBatch, ToySource, ToyTask, sample, toy_config

from training.engine.engines import make_engine
from training.engine.optimizer import learning_rate_share
from training.engine.plain import PlainEngine
from training.errors import TrainingError

WORKER = Path(__file__).parents[1] / "training_worker.py"
ZERO = ("zero0", "zero1", "zero2", "zero3")
STEPS = 6
OPENS_AT = 3


def run_launches(folder: Path, launches: list[tuple[list[dict], int]], *, timeout_s: float) -> list[list[int]]:
    """Exit codes of every launch's ranks; launches are (jobs, number of ranks), run one after the other."""
    for jobs, _ in launches:
        for job in jobs:
            Path(job["folder"]).mkdir(parents=True, exist_ok=True)
    path = folder / f"launches-{len(list(folder.glob('launches-*.json')))}.json"
    path.write_text(json.dumps([{"jobs": jobs, "num_ranks": num_ranks} for jobs, num_ranks in launches]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu"}
    environment["PYTHONPATH"] = str(WORKER.parents[1])  # else tests/cluster would stand for cluster
    subprocess.run([sys.executable, str(WORKER), str(path)], env=environment, check=True, timeout=timeout_s)
    return json.loads(path.with_suffix(".codes").read_text())


def exported(folder: Path) -> dict[str, Tensor]:
    return torch.load(folder / "exported.pt", weights_only=True)


def report(folder: Path, rank: int = 0) -> dict:
    return json.loads((folder / f"report-{rank}.json").read_text())


def losses(folder: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if row["key"] == "train/loss"]
    assert len(steps) == len(set(steps))
    return {row["step"]: row["value"] for row in rows if row["key"] == "train/loss"}


def largest_difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `one` and `two`: what these numbers of ranks made of the same jobs, forked from one process."""
    folder = tmp_path_factory.mktemp("launched")
    launches = [(jobs_of_one_rank(folder / "one"), 1), (jobs_of_two_ranks(folder / "two"), 2)]
    assert run_launches(folder, launches, timeout_s=240) == [[0], [0, 0]]
    return folder


def jobs_of_one_rank(folder: Path) -> list[dict]:
    """plain and ZeRO 0-3, all open, and again with an encoder that opens at step 3, and with one that never does."""
    jobs: list[dict] = [
        {"engine": engine, "folder": str(folder / f"{engine}-{opens_at}"), "opens_at": opens_at}
        for engine in ("plain", *ZERO)
        for opens_at in (0, OPENS_AT, STEPS)
    ]
    jobs.append({"engine": "zero2", "folder": str(folder / "poisoned"), "poisoned_scan": "scan-0019"})
    jobs.append({"engine": "zero2", "folder": str(folder / "bytes"), "measure": True})
    return jobs


def jobs_of_two_ranks(folder: Path) -> list[dict]:
    jobs: list[dict] = [
        {"engine": engine, "folder": str(folder / f"{engine}-{opens_at}"), "opens_at": opens_at}
        for engine in ZERO
        for opens_at in (0, OPENS_AT)
    ]
    jobs.append({"engine": "zero2", "folder": str(folder / "poisoned"), "poisoned_scan": "scan-0019"})
    asked = {"engine": "zero2", "folder": str(folder / "asked"), "stop_at": 3, "stop_rank": 1}
    jobs += [asked, {**asked, "report": "again", "stop_at": None}]
    jobs += [{"engine": stage, "folder": str(folder / f"sum-{stage}"), "measure_sum": True} for stage in ZERO]
    jobs.append({"engine": "zero2", "folder": str(folder / "bytes"), "measure": True})
    return jobs


@pytest.fixture(scope="module")
def one_rank(launched: Path) -> Path:
    return launched / "one"


@pytest.fixture(scope="module")
def two_ranks(launched: Path) -> Path:
    return launched / "two"


def test_plain_engine_equals_a_loop_written_out(tmp_path: Path) -> None:
    config = toy_config(tmp_path)
    engine = PlainEngine(ToyTask(), config)
    reference = ToyTask()
    matrices = {id(parameter) for parameter in reference.parameters() if parameter.ndim >= 2}
    head = {id(parameter) for parameter in (*reference.head.parameters(), reference.offset)}
    optimizer = torch.optim.AdamW(
        [
            {"params": [parameter], "weight_decay": 0.1 if id(parameter) in matrices else 0.0}
            for parameter in reference.parameters()
        ],
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    source = ToySource()
    for step, (micro_batches, _) in zip(range(STEPS), source.steps(source.initial_state()), strict=False):
        engine.begin(step)
        for batch in micro_batches:
            engine.backward(engine.losses(batch)["loss"])
        norm = engine.step()

        rows = [sample(index) for index in range(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH)]
        features = torch.stack([features for features, _ in rows])
        targets = torch.tensor([target for _, target in rows])
        outputs = reference.head(reference.encoder(features))[:, 0] + reference.offset
        torch.nn.functional.mse_loss(outputs, targets).backward()
        reference_norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        assert norm == pytest.approx(float(reference_norm), rel=1e-5)
        for group in optimizer.param_groups:
            share = learning_rate_share(config.schedule, step=step, num_steps=STEPS)
            group["lr"] = 1e-2 * share * (1.0 if id(group["params"][0]) in head else 0.5)
        optimizer.step()
        optimizer.zero_grad()
    assert largest_difference(dict(engine.task.state_dict()), dict(reference.state_dict())) < 1e-6


@pytest.mark.parametrize("engine", ZERO)
def test_zero_stage_on_one_rank_equals_plain(one_rank: Path, engine: str) -> None:
    assert largest_difference(exported(one_rank / f"{engine}-0"), exported(one_rank / "plain-0")) < 1e-5
    assert losses(one_rank / f"{engine}-0") == pytest.approx(losses(one_rank / "plain-0"), abs=1e-5)


@pytest.mark.parametrize("engine", ZERO)
def test_two_ranks_make_the_update_of_one(one_rank: Path, two_ranks: Path, engine: str) -> None:
    assert largest_difference(exported(two_ranks / f"{engine}-0"), exported(one_rank / "plain-0")) < 1e-5
    assert losses(two_ranks / f"{engine}-0") == pytest.approx(losses(one_rank / "plain-0"), abs=1e-5)


@pytest.mark.parametrize("engine", ZERO)
def test_metrics_see_every_sample_once_on_any_number_of_ranks(one_rank: Path, two_ranks: Path, engine: str) -> None:
    expected = report(one_rank / "plain-0")["metrics"]
    assert expected["validation/num_samples"] == 13
    for rank in (0, 1):
        assert report(two_ranks / f"{engine}-0", rank)["metrics"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("engine", ["plain", *ZERO])
def test_a_closed_group_does_not_move_at_all(one_rank: Path, engine: str) -> None:
    trained, initial = exported(one_rank / f"{engine}-{STEPS}"), ToyTask().state_dict()
    moved = {name for name in trained if not torch.equal(trained[name], initial[name])}
    assert moved == {"head.weight", "head.bias", "offset"}


@pytest.mark.parametrize("engine", ZERO)
def test_a_group_that_opens_later_moves_as_in_plain_pytorch(one_rank: Path, two_ranks: Path, engine: str) -> None:
    expected = exported(one_rank / f"plain-{OPENS_AT}")
    assert not torch.equal(expected["encoder.0.weight"], ToyTask().state_dict()["encoder.0.weight"])
    assert largest_difference(exported(one_rank / f"{engine}-{OPENS_AT}"), expected) < 1e-5
    assert largest_difference(exported(two_ranks / f"{engine}-{OPENS_AT}"), expected) < 1e-5


def test_a_loss_that_is_not_finite_stops_every_rank_naming_step_and_scans(one_rank: Path, two_ranks: Path) -> None:
    for folder, rank in ((one_rank, 0), (two_ranks, 0), (two_ranks, 1)):
        message = report(folder / "poisoned", rank)["error"]
        assert "step 2: loss is not finite; nothing was updated" in message
        # the micro-batch that holds scan 19; on two ranks it holds every second scan
        scans = "scan-0016, scan-0017, scan-0018, scan-0019" if folder is one_rank else "scan-0017, scan-0019"
        assert f"Scans: {scans}. Look" in message


def test_zero_2_halves_the_optimiser_of_a_rank_when_there_are_two(one_rank: Path, two_ranks: Path) -> None:
    whole = report(one_rank / "bytes")["optimizer_bytes"]
    num_parameters = sum(parameter.numel() for parameter in ToyTask(width=512).parameters())
    assert whole == pytest.approx(12 * num_parameters, rel=0.01)
    for rank in (0, 1):
        assert report(two_ranks / "bytes", rank)["optimizer_bytes"] <= 0.55 * whole


@pytest.mark.parametrize("engine", ZERO)
def test_ranks_add_up_their_gradients_in_float32_in_bf16_too(two_ranks: Path, engine: str) -> None:
    found = report(two_ranks / f"sum-{engine}")
    assert found["norm"] == pytest.approx(found["norm_of_sum"], rel=1e-6)


def test_a_signal_to_one_rank_stops_all_at_the_same_step_and_the_rerun_equals_the_uninterrupted_run(
    two_ranks: Path,
) -> None:
    messages = [report(two_ranks / "asked", rank)["error"] for rank in (0, 1)]
    assert messages[0] == messages[1]
    assert messages[0].startswith("step 4 of 6: stopped as asked by SIGTERM (rank 1); saved as ")
    assert "step-00000004" in messages[0]
    again = json.loads((two_ranks / "asked" / "again-0.json").read_text())
    assert again["start"] == "own"
    assert losses(two_ranks / "asked") == losses(two_ranks / "zero2-0")
    assert largest_difference(exported(two_ranks / "asked"), exported(two_ranks / "zero2-0")) == 0.0


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_a_compiled_task_has_the_losses_of_the_plain_one(tmp_path: Path) -> None:
    config = toy_config(tmp_path)
    found = []
    for is_compiled in (False, True):
        settings = dataclasses.replace(config.engine, compile=is_compiled)
        engine = make_engine(ToyTask(), dataclasses.replace(config, engine=settings), num_micro_batches=1)
        losses_of_run = []
        source = ToySource(num_micro_batches=1)
        for step, (batches, _) in zip(range(3), source.steps(source.initial_state()), strict=False):
            engine.begin(step)
            loss = engine.losses(batches[0])["loss"]
            engine.backward(loss)
            engine.step()
            losses_of_run.append(float(loss.detach()))
        found.append(losses_of_run)
    assert found[0] != found[0][:1] * 3
    assert found[1] == pytest.approx(found[0], abs=1e-5)


def test_a_task_that_cannot_checkpoint_its_activations_says_so(tmp_path: Path) -> None:
    config = toy_config(tmp_path)
    settings = dataclasses.replace(config.engine, activation_checkpointing=True)
    with pytest.raises(
        TrainingError, match=r"^ToyTask cannot checkpoint its activations; set train\.engine\.activation"
    ):
        make_engine(ToyTask(), dataclasses.replace(config, engine=settings), num_micro_batches=1)


def test_nothing_is_updated_when_the_loss_is_not_finite(tmp_path: Path) -> None:
    task = ToyTask()
    task.poisoned_scan = "scan-0003"
    engine = PlainEngine(task, toy_config(tmp_path))
    before = {name: value.clone() for name, value in task.state_dict().items()}
    engine.begin(0)
    source = ToySource(num_micro_batches=1)
    batches, _ = next(source.steps(source.initial_state()))
    engine.backward(engine.losses(batches[0])["loss"])
    assert not math.isfinite(engine.step())
    assert all(torch.equal(before[name], value) for name, value in task.state_dict().items())


def test_a_frozen_encoder_costs_no_backward(tmp_path: Path) -> None:
    task = ToyTask(encoder_opens_at=100)
    engine = PlainEngine(task, toy_config(tmp_path))
    engine.begin(0)
    batch: ToyBatch = next(iter(ToySource().evaluation("validation", limit=None)))
    assert not task.encoder(batch.features).requires_grad
    assert task.outputs(batch).requires_grad


def test_the_learning_rate_warms_up_and_ends_at_its_final_share(tmp_path: Path) -> None:
    schedule = toy_config(tmp_path).schedule
    shares = [learning_rate_share(schedule, step=step, num_steps=6) for step in range(6)]
    assert shares == pytest.approx([0.5, 1.0, 1.0, 0.775, 0.325, 0.1])
