"""The losses of an alignment have known values, and stand beside the levels of two models that know nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from finetune.tasks.contrastive_alignment.losses import (
    LossConfig,
    Temperature,
    alignment_losses,
    levels,
    temperature_problems,
)

TAU = torch.full((1,), 0.05)
LEARNED = LossConfig("info_nce", 0.05, True, 0.01, 0.5)


def unrelated(num_rows: int, width: int = 512) -> torch.Tensor:
    return functional.normalize(torch.randn(num_rows, width, generator=torch.Generator().manual_seed(num_rows)), dim=1)


def level(num_rows: int, name: str) -> float:
    found = levels(torch.ones(num_rows), torch.arange(num_rows), width=512, temperature=TAU)
    return float(found[name])


def test_constant_similarities_give_the_plateaus_that_the_study_saw() -> None:
    assert (level(32, "constant_level") + level(8, "constant_level")) / 2 == pytest.approx(2.773, abs=5e-4)
    assert level(5, "constant_level") == pytest.approx(1.609, abs=5e-4)


@pytest.mark.parametrize(("num_rows", "expected"), [(32, 3.84), (8, 2.41), (5, 1.91)])
def test_unrelated_embeddings_lie_above_constant_ones(num_rows: int, expected: float) -> None:
    assert level(num_rows, "random_level") == pytest.approx(expected, abs=0.015)
    expansion = math.log(num_rows) + (1 - 1 / num_rows) / (2 * 512 * 0.05**2)
    assert level(num_rows, "random_level") == pytest.approx(expansion, abs=0.03)


def test_levels_are_the_losses_of_such_embeddings() -> None:
    rows = {"constant_level": torch.ones(48, 512), "random_level": unrelated(48)}
    others = {"constant_level": torch.ones(48, 512), "random_level": unrelated(49)[:48]}
    subjects = torch.arange(48) % 40  # eight subjects twice
    weight = torch.ones(48)
    weight[-3:] = 0
    for name, first in rows.items():
        found = alignment_losses(first, others[name], weight, subjects=subjects, temperature=TAU, kind="info_nce")
        assert float(found["loss"]) == pytest.approx(float(found[name]), abs=1e-4 if name == "constant_level" else 0.25)
    candidates = [44.0] * 10 + [45.0] * 35
    expected = sum(map(math.log, candidates)) / 45
    assert float(found["constant_level"]) == pytest.approx(expected, abs=1e-5)


def test_mean_squared_difference_of_the_memorisation_test_is_that_of_its_table() -> None:
    first = torch.zeros(2, 512)
    first[:, 0] = 3.0
    second = torch.zeros(2, 512)
    second[:, 0], second[:, 1] = 0.036, math.sqrt(1 - 0.036**2)
    weight = torch.tensor([1.0, 0.0])
    loss = alignment_losses(first, second, weight, subjects=torch.arange(2), temperature=TAU, kind="mse")["loss"]
    assert float(loss) == pytest.approx(0.0038, abs=5e-5)
    assert float(loss) == pytest.approx((2 - 2 * 0.036) / 512, rel=1e-5)


def test_a_learned_temperature_starts_where_it_should_and_cannot_leave_its_bounds() -> None:
    temperature = Temperature(LEARNED)
    assert temperature().item() == pytest.approx(0.05)
    for sign, bound in ((1, 0.01), (-1, 0.5)):
        temperature = Temperature(LEARNED)
        optimizer = torch.optim.SGD(temperature.parameters(), lr=1e4)
        for _ in range(20):
            optimizer.zero_grad()
            (sign * temperature()).sum().backward()
            optimizer.step()
        assert temperature().item() == pytest.approx(bound, rel=0.05)
        assert 0.01 * (1 - 1e-6) <= temperature().item() <= 0.5 * (1 + 1e-6)


def test_a_fixed_temperature_has_no_parameter_and_bad_bounds_are_named() -> None:
    fixed = LossConfig("info_nce", 0.05, False, 0.01, 0.5)
    assert list(Temperature(fixed).parameters()) == []
    assert temperature_problems(fixed, "task.loss") == []
    outside = LossConfig("info_nce", 0.5, True, 0.01, 0.5)
    assert temperature_problems(outside, "task.loss") == [
        "task.loss.temperature: 0.5; must lie between task.loss.lowest_temperature 0.01 (above 0) and "
        "task.loss.highest_temperature 0.5"
    ]
