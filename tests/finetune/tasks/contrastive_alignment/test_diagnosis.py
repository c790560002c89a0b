"""One batch learned by heart by a healthy pipeline, and what is said of planted faults."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from brain_models.space import space_from_mask
from configs.entry import compose
from data_sharding.read.batch import PairedBatch, WindowBatch
from finetune.errors import FinetuneError
from finetune.tasks import parse_task
from finetune.tasks.contrastive_alignment.config import FUNCTION, STRUCTURE, Config
from finetune.tasks.contrastive_alignment.diagnosis import (
    constant_inputs,
    first_of_each_subject,
    memorise,
    norm_lines,
    read_curves,
    sentence,
)
from finetune.tasks.contrastive_alignment.plateau import analyse
from finetune.tasks.contrastive_alignment.task import ContrastiveAlignment
from tests.bundles import cubes

NUM_SUBJECTS, NUM_VOXELS, NUM_REGIONS, NUM_FRAMES = 8, 20, 6, 10
SPACE = space_from_mask(np.ones((4, 5, 1), dtype=bool), np.eye(4), name="slice", template="none")
KNOWN = {"width": 16, "temperature": 0.05}


class Layer(nn.Module):
    """A network of one layer on the mean over time, which a fault can detach."""

    def __init__(self, num_inputs: int, *, is_detached: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(num_inputs, 32)
        self.is_detached = is_detached

    def forward(self, values: Tensor, *rest: Tensor) -> Tensor:
        features = self.linear(values.mean(dim=1)).tanh()
        return features.detach() if self.is_detached else features


class TinyTower(nn.Module):
    def __init__(self, num_inputs: int, *, is_detached: bool) -> None:
        super().__init__()
        self.network = Layer(num_inputs, is_detached=is_detached)
        self.projection = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.projection(self.network(*inputs))


def task_of(*, is_detached: bool = False) -> ContrastiveAlignment:
    torch.manual_seed(0)
    names = ["task=contrastive_alignment", "shards=a", "encoder=scratch", "run.folder=b", "task.function.shards=a"]
    names += ["task.rows_per_chunk=8"]
    config = parse_task(compose("finetune", names)["task"], Config)
    towers = TinyTower(NUM_VOXELS, is_detached=is_detached), TinyTower(NUM_REGIONS, is_detached=False)
    subjects = [f"s{number}" for number in range(NUM_SUBJECTS)]
    return ContrastiveAlignment(*towers, config, subjects=subjects, stem=cubes(SPACE, 2))  # type: ignore[arg-type]


def windows(width: int, num_frames: int, *, is_constant: bool = False) -> WindowBatch:
    generator = torch.Generator().manual_seed(width)
    values = torch.randn(NUM_SUBJECTS, num_frames, width, generator=generator)
    names = [f"s{number}" for number in range(NUM_SUBJECTS)]
    return WindowBatch(
        values=values[:1].expand_as(values).clone() if is_constant else values,
        is_measured=torch.ones(NUM_SUBJECTS, width, dtype=torch.bool),
        repetition_time_s=torch.full((NUM_SUBJECTS,), 0.6),
        weight=torch.ones(NUM_SUBJECTS),
        sample_seed=torch.arange(NUM_SUBJECTS),
        scan_ids=names,
        subjects=names,
        first_frame=[0] * NUM_SUBJECTS,
    )


def batch_of(*, is_constant: bool = False) -> PairedBatch:
    sides = {
        STRUCTURE: windows(NUM_VOXELS, 1, is_constant=is_constant),
        FUNCTION: windows(NUM_REGIONS, NUM_FRAMES),
    }
    of = sides[STRUCTURE]
    return PairedBatch(sides, of.weight, of.sample_seed, of.scan_ids, of.subjects, [(0, 0)] * NUM_SUBJECTS)


def verdict(*, is_detached: bool = False, is_constant: bool = False) -> str:
    """What is said of a pipeline with a fault, after three steps."""
    batch = batch_of(is_constant=is_constant)
    memorised = [
        memorise(task_of(is_detached=is_detached), batch, kind, num_steps=3, learning_rate=1e-2)
        for kind in ("mse", "info_nce")
    ]
    return sentence(memorised, constant_inputs(batch), None)


def test_a_healthy_pipeline_learns_one_batch_by_heart() -> None:
    task, batch = task_of(), batch_of()
    by_mse, by_info_nce = (
        memorise(task_of(), batch, kind, num_steps=60, learning_rate=1e-2) for kind in ("mse", "info_nce")
    )
    assert by_mse.cosine > 0.99
    assert by_mse.losses[-1] == pytest.approx((2 - 2 * by_mse.cosine) / 16, abs=1e-3)
    assert (by_info_nce.recall, by_info_nce.constant_level) == (1.0, pytest.approx(np.log(8), abs=1e-5))
    assert by_info_nce.losses[-1] < 0.05 < by_info_nce.losses[0]
    assert min(by_info_nce.ranks.values()) > 2
    assert all(parameter.grad is None for parameter in task.parameters())
    said = sentence([by_mse, by_info_nce], [], None)
    assert said.startswith("The pipeline memorises one batch of 8 subjects: by MSE the cosine of pairs is 1.000")
    assert "R@1 is 1.000" in said
    lines = norm_lines([by_mse, by_info_nce]).splitlines()
    assert len(lines) == 1 + 2 * 4
    norms = by_info_nce.gradient_norms["function.network"]
    assert lines[-2].split("  ")[0] == "info_nce function.network"
    assert lines[-2].endswith(f"{norms[0]:.2g}, {np.median(norms):.2g}, {norms[-1]:.2g}")


def test_a_detached_encoder_is_named() -> None:
    assert "no gradient reaches structure.network: it is detached from the loss" in verdict(is_detached=True)


def test_constant_input_is_named() -> None:
    said = verdict(is_constant=True)
    assert said.startswith("The pipeline does not memorise one batch: all structure inputs of the batch are alike")
    assert "R@1 is 0.125" in said


def test_too_few_steps_are_told_from_a_fault() -> None:
    assert "more steps, or another learning rate, would have to tell" in verdict()


def test_rows_of_a_subject_after_its_first_do_not_count() -> None:
    batch = batch_of()
    twice = dataclasses.replace(batch, subjects=["s0", "s1", "s0", *batch.subjects[3:]])
    assert first_of_each_subject(twice).weight.tolist() == [1, 1, 0, 1, 1, 1, 1, 1]


def test_curves_are_read_from_a_table_and_from_a_run(tmp_path: Path) -> None:
    (tmp_path / "study.csv").write_text("epoch,train,validation\n1,2.9,1.7\n2,2.773,1.609\n3,2.773,\n")
    curves = read_curves(f"{tmp_path}/study.csv")
    assert (curves.train, curves.validation) == ([2.9, 2.773, 2.773], [1.7, 1.609])
    assert analyse(curves, width=512, temperature=0.05, num_subjects=40).name == "collapse"
    rows = {"train/loss": 2.08, "train/constant_level": 2.079, "train/random_level": 2.4}
    rows |= {"validation/loss": 1.61, "validation/constant_level": 1.609, "validation/random_level": 1.9}
    rows |= {f"validation/{name}_{side}": 0.0 for name in ("rank", "variance") for side in (STRUCTURE, FUNCTION)}
    lines = [json.dumps({"key": key, "step": 1, "value": value}) for key, value in rows.items()]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    finding = analyse(read_curves(str(tmp_path)), **KNOWN, num_subjects=8)
    assert (finding.name, len(finding.evidence)) == ("collapse", 4)
    (tmp_path / "empty.csv").write_text("loss\n1\n")
    with pytest.raises(FinetuneError, match=r"empty\.csv: no numbers in a column train; give columns train and valid"):
        read_curves(f"{tmp_path}/empty.csv")
