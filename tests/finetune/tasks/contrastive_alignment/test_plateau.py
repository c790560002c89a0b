"""The analysis of curves: the study's tables, each kind of plateau, and planted faults."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from finetune.tasks.contrastive_alignment.plateau import Curves, Finding, Levels, analyse, compositions

KNOWN = {"width": 512, "temperature": 0.05, "num_subjects": 40}
OF_40 = Levels.of((32, 8), width=512, temperature=0.05)
OF_5 = Levels.of((5,), width=512, temperature=0.05)


def found(curves: Curves, **changes: object) -> Finding:
    return analyse(curves, **{**KNOWN, **changes})  # type: ignore[arg-type]


def test_levels_of_the_studys_batches_are_its_numbers() -> None:
    assert OF_40.constant == pytest.approx(2.773, abs=5e-4)
    assert OF_40.random == pytest.approx((3.84 + 2.42) / 2, abs=0.01)
    assert OF_5.constant == pytest.approx(1.609, abs=5e-4)
    assert (32, 8) in compositions(40)


def test_the_studys_plateau_with_everything_trainable_is_a_collapse_of_batches_of_32_and_8() -> None:
    finding = found(Curves([2.9, *[2.773] * 49], [1.609] * 50, validation_levels=OF_5))
    assert finding.name == "collapse"
    assert "a constant similarity in batches of 1 x 32 and 1 x 8 (2.773)" in finding.evidence[0]
    assert finding.evidence[1] == "the validation loss ends at 1.609, at 1.609 of batches of 1 x 5"
    assert "needs one constant vector a side" in finding.unknown[0]
    assert "never left a start" in finding.unknown[1]
    assert found(Curves([2.773] * 50, [1.609] * 50), num_subjects=None).name == "collapse"


def test_the_studys_frozen_run_memorises_and_does_not_underfit() -> None:
    losses = [2.8 - 2.35 * step / 49 for step in range(50)] + [0.45] * 5
    finding = found(Curves(losses, [1.7, 2.9, 4.13], OF_40, OF_5))
    assert finding.name == "memorising"
    assert finding.evidence[1] == "the validation loss ends at 4.130, above 1.609 of batches of 1 x 5"


def test_a_collapse_shows_which_side_is_constant() -> None:
    curves = Curves([2.773] * 20, [1.609], OF_40, OF_5, {"T1": 0.0, "fMRI": 4.2}, {"T1": 0.0, "fMRI": 0.4})
    finding = found(curves)
    assert finding.name == "collapse"
    assert finding.evidence[-1] == "T1 has effective rank 0.0 and variance 0.000"
    assert "fMRI" not in finding.evidence[-1]
    spread = replace(curves, ranks={"T1": 12.0, "fMRI": 9.0}, variances={"T1": 0.8, "fMRI": 0.7})
    assert found(spread).name == "chance"


def test_unrelated_embeddings_are_chance_and_not_a_collapse() -> None:
    finding = found(Curves([OF_40.random + 0.02] * 20, [1.95], OF_40, OF_5, {"T1": 20.0, "fMRI": 20.0}))
    assert finding.name == "chance"
    assert "memorise one batch" in finding.unknown[0]


@pytest.mark.parametrize(
    ("train", "validation", "name"),
    [(0.3, 0.9, "learning"), (0.3, 1.7, "memorising"), (2.2, 1.55, "underfitting"), (2.2, 1.7, "underfitting")],
)
def test_a_loss_below_chance_is_read_beside_held_out_subjects(train: float, validation: float, name: str) -> None:
    assert found(Curves([2.8, train], [1.7, validation], OF_40, OF_5)).name == name


def test_a_detached_encoder_and_exploding_gradients_are_bugs() -> None:
    healthy = Curves([2.8, 1.0, 0.3], [1.0], OF_40, OF_5, gradient_norms={"T1": [1.0, 0.5, 0.1], "fMRI": [1.0] * 3})
    assert found(healthy).name == "learning"
    detached = found(replace(healthy, gradient_norms={"T1": [0.0] * 3, "fMRI": [1.0] * 3}))
    assert (detached.name, detached.evidence[0]) == ("bug", "no gradient ever reached T1")
    exploding = found(replace(healthy, gradient_norms={"T1": [1.0, 2.0, 9e9]}))
    assert (exploding.name, exploding.evidence[0]) == ("bug", "the gradient of T1 reached 9e+09, 2 being usual")
    broken = found(replace(healthy, train=[2.8, math.nan, math.nan]))
    assert broken.evidence[0] == "the training loss is not finite from point 1 on"
    assert str(broken).startswith("Bug: the training loss is not finite from point 1 on. Not known: whether data or")
