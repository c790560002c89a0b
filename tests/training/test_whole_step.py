"""A loss over all rows of a step is the same, with its gradient, in one process and on ranks, in chunks and at once."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from test_training_engines import STEPS, ZERO, exported, largest_difference, losses, run_launches
from torch import Tensor, nn
from training_toys import PAIR_SIDES, ToyPairs, pair_batch, toy_config

from training.engine.engines import make_engine
from training.errors import TrainingError
from training.whole_step import encoded_in_chunks, symmetric_info_nce

OPENS_AT = 3


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders <engine>-<number of ranks> of pairs whose right encoder opens at step 3."""
    folder = tmp_path_factory.mktemp("pairs")
    common = {"task": "pairs", "opens_at": OPENS_AT, "group_norms": True}
    launches = [
        ([{**common, "engine": engine, "folder": str(folder / f"{engine}-{ranks}")} for engine in engines], ranks)
        for ranks, engines in ((1, ("plain", *ZERO)), (2, ZERO))
    ]
    assert run_launches(folder, launches, timeout_s=240) == [[0], [0, 0]]
    return folder


def tracked(folder: Path, prefix: str) -> dict[tuple[str, int], float]:
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return {(row["key"], row["step"]): row["value"] for row in rows if row["key"].startswith(prefix)}


@pytest.mark.parametrize("engine", ZERO)
def test_two_ranks_make_the_updates_of_one_process(launched: Path, engine: str) -> None:
    expected = exported(launched / "plain-1")
    assert not torch.equal(expected["encoders.right.0.weight"], ToyPairs().state_dict()["encoders.right.0.weight"])
    assert float(expected["temperature"]) != 0.5
    for ranks in (1, 2):
        assert largest_difference(exported(launched / f"{engine}-{ranks}"), expected) < 1e-5
        assert losses(launched / f"{engine}-{ranks}") == pytest.approx(losses(launched / "plain-1"), abs=1e-5)


@pytest.mark.parametrize("engine", ZERO)
def test_norms_of_groups_are_those_of_plain_pytorch(launched: Path, engine: str) -> None:
    expected = tracked(launched / "plain-1", "train/gradient_norm/")
    named = {name.removeprefix("train/gradient_norm/") for name, _ in expected}
    assert named == {"left", "left/no_decay", "right", "right/no_decay", "temperature"}
    assert min(step for name, step in expected if name.endswith("/right")) == OPENS_AT + 1
    whole = tracked(launched / "plain-1", "train/gradient_norm")
    for step in range(1, STEPS + 1):
        parts = [value for (_, at), value in expected.items() if at == step]
        assert math.hypot(*parts) == pytest.approx(whole["train/gradient_norm", step], rel=1e-5)
    for ranks in (1, 2):
        assert tracked(launched / f"{engine}-{ranks}", "train/gradient_norm/") == pytest.approx(expected, rel=1e-4)


def info_nce_written_out(left: Tensor, right: Tensor, temperature: float, subjects: list[int]) -> float:
    """The symmetric loss of real rows, as a loop over float64; other rows of a subject are no candidates."""
    sides = [[row / row.norm() for row in side.double()] for side in (left, right)]
    losses_of_rows = []
    for first, second in (sides, sides[::-1]):
        for index, row in enumerate(first):
            own = float(row @ second[index]) / temperature
            others = [
                float(row @ each) / temperature
                for each, of in zip(second, subjects, strict=True)
                if of != subjects[index]
            ]
            losses_of_rows.append(math.log(1 + sum(math.exp(score - own) for score in others)))
    return sum(losses_of_rows) / len(losses_of_rows)


def test_the_loss_is_that_of_a_loop_over_real_rows_in_float64() -> None:
    task, batch = ToyPairs(), pair_batch([3, 4, 5, 6, 9], 8)
    subjects = batch.subject.tolist()[:5]
    assert subjects == [3, 4, 5, 0, 3]
    left, right = (task.encoders[side](batch.sides[side][:5]).detach() for side in PAIR_SIDES)
    loss = task(batch)["loss"]
    assert loss.item() == pytest.approx(info_nce_written_out(left, right, 0.5, subjects), rel=1e-6)
    loss.backward()
    weight = task.encoders["left"][0].weight
    for index in ((0, 0), (7, 3), (11, 5)):
        ends = []
        for shift in (1e-6, -1e-6):
            moved = ToyPairs().double()
            moved.encoders["left"][0].weight.data[index] += shift
            rows = (moved.encoders[side](batch.sides[side][:5].double()).detach() for side in PAIR_SIDES)
            ends.append(info_nce_written_out(*rows, 0.5, subjects))
        assert float(weight.grad[index]) == pytest.approx((ends[0] - ends[1]) / 2e-6, abs=2e-6)


def test_a_step_of_padding_alone_has_loss_and_gradient_zero() -> None:
    task = ToyPairs()
    loss = task(pair_batch([], 4))["loss"]
    loss.backward()
    assert float(loss) == 0.0
    assert all(torch.equal(each.grad, torch.zeros_like(each)) for each in task.parameters() if each.grad is not None)


def test_identical_rows_are_found_by_chance() -> None:
    rows = torch.ones(8, 3)
    loss = symmetric_info_nce(rows, rows, torch.ones(8), temperature=torch.full((1,), 0.05))
    assert float(loss) == pytest.approx(math.log(8))


def test_chunks_keep_no_activation_and_draw_the_same_random_numbers_again() -> None:
    torch.manual_seed(1)
    encoder = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Tanh(), nn.Linear(64, 2))
    rows = torch.randn(6, 4)
    kept: list[int] = []

    def count(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    torch.manual_seed(2)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        embedded = encoded_in_chunks(encoder, rows, rows_per_chunk=2)
    assert sum(kept) <= rows.numel()
    embedded.square().sum().backward()
    found = encoder[0].weight.grad.clone()
    encoder.zero_grad()
    torch.manual_seed(2)
    torch.cat([encoder(chunk) for chunk in rows.split(2)]).square().sum().backward()
    assert torch.equal(found, encoder[0].weight.grad)


def test_several_micro_batches_of_a_rank_are_refused(tmp_path: Path) -> None:
    message = r"^ToyPairs compares all rows of a step .* it has 2; set data\.micro_batch_size to data\.batch_size div"
    with pytest.raises(TrainingError, match=message):
        make_engine(ToyPairs(), toy_config(tmp_path), num_micro_batches=2)


def test_a_parameter_without_dimensions_is_refused_by_name(tmp_path: Path) -> None:
    task = ToyPairs()
    task.temperature = nn.Parameter(torch.tensor(0.5))
    with pytest.raises(TrainingError, match=r"^ToyPairs: temperature: a parameter without dimensions .* shape \[1\]"):
        make_engine(task, toy_config(tmp_path), num_micro_batches=1)
