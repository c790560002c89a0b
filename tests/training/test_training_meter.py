"""What a run says about itself: throughput without padding, goodput without repeated steps, spikes, a trace."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from test_training_checkpoints import run
from training_toys import GLOBAL_BATCH, ToyConfig, ToySource, ToyTask, toy_batch, toy_config

from configs.entry import compose
from training.config import ProfileConfig, ScheduleConfig, SpikeConfig
from training.loop import Services, fit
from training.step import BatchFeed
from training.task import Cost
from training.watch.meter import Counts, Meter, longest_prefix, peak_tflops_of
from training.watch.spikes import Spikes
from training.watch.tracking import Spool, last_step, read_rows

CPU = torch.device("cpu")
CONSTANT = ScheduleConfig(kind="constant", warmup_steps=2, final_share=1.0, plateau=None)


def meter(*, peak_tflops: float | None = None, repeated_until: int = 0) -> Meter:
    return Meter(CPU, peak_tflops=peak_tflops, started=time.monotonic(), repeated_until=repeated_until)


def test_rates_are_sums_over_the_time_of_the_steps() -> None:
    numbers = meter(peak_tflops=4.0)
    numbers.counts = Counts(
        step_s=[1.0, 1.0, 2.0], wait_s=0.2, forwards=[(0.0, 0.5)], num_samples=8, tokens=400, flops=8e12
    )
    found = numbers.report()
    assert found["samples_per_s"] == 2
    assert found["tokens_per_s_per_device"] == 100
    assert found["tflops_per_device"] == 2
    assert found["mfu"] == 0.5
    assert found["data_wait_share"] == pytest.approx(0.05)
    assert (found["step_p50_s"], found["step_p95_s"]) == (1.0, pytest.approx(1.9))
    assert (found["slowest_rank"], found["slowest_rank_lag"]) == (0, 0)
    assert numbers.counts == Counts()


def test_padding_yields_no_samples_tokens_or_flops() -> None:
    numbers = meter()
    numbers.count(Cost(tokens=80, flops=8e6))
    numbers.end_step(1, [toy_batch([1, 2, 3], 4)])
    assert numbers.counts.num_samples == 3
    assert (numbers.counts.tokens, numbers.counts.flops) == (60, 6e6)


def test_a_step_that_an_earlier_attempt_had_made_is_no_useful_time(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "metrics.jsonl", start=b"")
    spool.add(7, {"train/loss": 1.0})
    spool.close()
    numbers = meter(repeated_until=last_step(tmp_path / "metrics.jsonl"))
    for done, is_useful in ((7, False), (8, True)):
        numbers.begin_step()
        numbers.end_step(done, [])
        assert (numbers.useful_s > 0) == is_useful


def test_mfu_is_only_told_of_a_device_whose_peak_is_known() -> None:
    table = compose("pretrain", [])["train"]["peak_tflops"]
    assert longest_prefix("NVIDIA H200", table) == longest_prefix("NVIDIA H100 80GB HBM3", table) == 989.4
    assert longest_prefix("NVIDIA H100 PCIe", table) == 756.5
    assert longest_prefix("NVIDIA A10G", table) == 70.0
    assert longest_prefix("NVIDIA Next", table) is None


@pytest.mark.parametrize(
    ("device", "precision", "expected"),
    [("cuda", "bf16", 989.4), ("cuda", "fp32", None), ("cpu", "bf16", None), ("cpu", "fp32", None)],
)
def test_the_peak_counts_for_bf16_on_a_gpu_alone(
    device: str, precision: str, expected: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    assert peak_tflops_of(torch.device(device), {"NVIDIA H100": 989.4}, precision=precision) == expected
    numbers = meter()
    numbers.counts.step_s = [1.0]
    assert "mfu" not in numbers.report()


def test_every_interval_tells_where_the_time_went(tmp_path: Path) -> None:
    config = toy_config(tmp_path, steps=4, checkpoint_every=2)
    run(config)
    rows = {row["key"]: row["value"] for row in read_rows(Path(config.run.folder) / "metrics.jsonl")}
    assert rows["train/samples_per_s"] > 0
    assert rows["train/tokens_per_s_per_device"] == pytest.approx(rows["train/samples_per_s"])  # a toy has one token
    assert 0 < rows["train/goodput"] < 1
    assert 0 < rows["train/checkpoint_stall_share"] < 1
    assert rows["train/gradient_norm"] > 0
    assert 0.05 < rows["train/memory_peak_gib"] < 100


def test_the_next_step_is_asked_for_once_the_last_batch_of_this_one_was_worked_on() -> None:
    asked: list[int] = []

    class Counting(ToySource):
        def counted(self) -> Iterator:
            for step, item in enumerate(self.steps(self.initial_state())):
                asked.append(step)
                yield item

    ahead = BatchFeed(Counting().counted(), CPU, meter(), is_ahead=True)
    seen = []
    for step in range(3):
        batches, state = ahead.next_batches()
        assert state["samples_consumed"] == GLOBAL_BATCH * (step + 1)
        for batch in ahead.on_device(batches, is_last_step=step == 2):
            assert asked == list(range(step + 1))
            seen += batch.scan_ids
    plain = [
        scan_id
        for (batches, _), _ in zip(ToySource().steps({"samples_consumed": 0}), range(3), strict=False)
        for batch in batches
        for scan_id in batch.scan_ids
    ]
    assert seen == plain
    assert asked == [0, 1, 2]


def test_a_loss_far_above_those_before_is_a_spike_until_it_is_the_rule() -> None:
    spikes = Spikes(SpikeConfig(window_steps=20, threshold=8.0), None, start=b"", recent=b"")
    noise = np.random.default_rng(0).normal(1.0, 0.05, 60)
    assert all(spikes.deviations({"loss": float(loss)}) is None for loss in noise)
    assert spikes.deviations({"loss": 0.0}) is None  # a fall is none
    above = spikes.deviations({"loss": 2.0})
    assert above is not None
    assert above == pytest.approx(20, rel=0.5)
    assert spikes.deviations({"loss": 2.0}) is not None
    levels = [spikes.deviations({"loss": 2.0 + 0.05 * (step % 3)}) for step in range(20)]
    assert levels[-1] is None


def test_a_set_with_a_higher_loss_than_the_other_sets_of_a_run_is_no_spike() -> None:
    spikes = Spikes(SpikeConfig(window_steps=20, threshold=8.0), None, start=b"", recent=b"")
    generator = np.random.default_rng(0)
    for step in range(300):
        name, level = ("anat", 0.9) if step % 10 == 0 else ("rest", 0.3)
        loss = float(generator.normal(level, 0.02))
        assert spikes.deviations({"loss": loss, f"loss/{name}": loss}) is None
    assert spikes.deviations({"loss": 0.9, "loss/rest": 0.9}) is not None


def test_a_spike_is_kept_with_its_scans_and_never_stops_the_run(tmp_path: Path) -> None:
    config = toy_config(tmp_path, steps=8, checkpoint_every=4)
    task = ToyTask()
    task.heavy_scan = "scan-0045"
    fit(task, ToySource(), config, Services(config.run, {"train": {}}, None))
    kept = [json.loads(line) for line in (Path(config.run.folder) / "spikes.jsonl").read_text().splitlines()]
    assert [line["step"] for line in kept] == [6]
    assert kept[0]["scan_ids"] == [f"scan-{index:04d}" for index in range(40, 48)]
    rows = {row["key"]: row for row in read_rows(Path(config.run.folder) / "metrics.jsonl")}
    assert rows["train/loss_spike"]["step"] == 6
    assert rows["train/loss_spike"]["value"] == pytest.approx(kept[0]["loss"])
    assert rows["train/loss_spike_deviations"]["value"] > 20


def test_a_resumed_run_flags_the_spike_that_the_uninterrupted_one_does(tmp_path: Path) -> None:
    def kept(folder: Path, *steps: int) -> str:
        for num_steps in steps:
            task = ToyTask()
            task.heavy_scan = "scan-0045"
            config = dataclasses.replace(toy_config(folder, steps=num_steps), schedule=CONSTANT)
            fit(task, ToySource(), config, Services(config.run, {"train": {}}, None))
        return (folder / "run" / "spikes.jsonl").read_text()

    whole = kept(tmp_path / "whole", 8)
    assert json.loads(whole)["step"] == 6
    assert kept(tmp_path / "resumed", 3, 5, 8) == whole


def profiled(config: ToyConfig, num_steps: int) -> ToyConfig:
    return dataclasses.replace(config, profile=ProfileConfig(start_step=2, num_steps=num_steps))


def test_a_trace_of_the_asked_steps_lies_in_the_run_folder(tmp_path: Path) -> None:
    run(profiled(toy_config(tmp_path), num_steps=2))
    (trace,) = (tmp_path / "run" / "profile").iterdir()
    assert trace.name == "before-step-00000004.json"
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert "aten::addmm" in names
    run(profiled(toy_config(tmp_path / "off"), num_steps=0))
    assert not (tmp_path / "off" / "run" / "profile").exists()
