"""Augmentation is a function of the sample's seed, and changes what it says and nothing else."""

from __future__ import annotations

import dataclasses

import torch

from finetune.tasks.contrastive_alignment.augmentation import (
    FunctionAugmentation,
    StructureAugmentation,
    augment_series,
    augment_t1,
    generators_of,
)

STRUCTURE = StructureAugmentation(scale=0.1, shift=0.1, noise=0.05, bias=0.2, bias_wavelength_mm=150.0)
FUNCTION = FunctionAugmentation(shortest_share=0.5, dropped_regions=0.3, noise=0.1)
SEEDS = torch.tensor([5, 6, 7])
POSITIONS = torch.rand(40, 3, generator=torch.Generator().manual_seed(0)) * 150
T1 = torch.randn(3, 1, 40, generator=torch.Generator().manual_seed(1))
SERIES = torch.randn(3, 20, 30, generator=torch.Generator().manual_seed(2))
IS_MEASURED = torch.arange(40).expand(3, -1) > 2
IS_FRAME = torch.arange(20).expand(3, -1) < torch.tensor([[20], [16], [10]])


def t1_of(rows: list[int], config: StructureAugmentation = STRUCTURE) -> torch.Tensor:
    generators = generators_of(SEEDS[rows], torch.device("cpu"))
    return augment_t1(T1[rows], IS_MEASURED[rows], POSITIONS, generators=generators, config=config)


def series_of(rows: list[int], config: FunctionAugmentation = FUNCTION) -> tuple[torch.Tensor, torch.Tensor]:
    generators = generators_of(SEEDS[rows], torch.device("cpu"))
    return augment_series(SERIES[rows], IS_FRAME[rows], generators=generators, config=config)


def test_a_row_is_augmented_alike_in_any_batch_and_rows_differ() -> None:
    torch.testing.assert_close(t1_of([1]), t1_of([0, 1, 2])[1:2])
    alone, together = series_of([2]), series_of([0, 2])
    assert torch.equal(alone[0], together[0][1:])
    assert torch.equal(alone[1], together[1][1:])
    same = T1[:1].expand(2, -1, -1)
    generators = generators_of(SEEDS[:2], torch.device("cpu"))
    twice = augment_t1(same, IS_MEASURED[:2], POSITIONS, generators=generators, config=STRUCTURE)
    assert (twice[0] - twice[1]).abs().max() > 0.1


def test_what_is_not_measured_and_what_is_padding_stays_zero() -> None:
    assert not t1_of([0, 1, 2])[:, 0, :3].any()
    values, is_left = series_of([0, 1, 2])
    assert not (is_left & ~IS_FRAME).any()
    assert not values[~is_left].any()


def test_a_bias_alone_is_a_smooth_wave_that_leaves_the_darkest_voxel() -> None:
    config = dataclasses.replace(STRUCTURE, scale=0.0, shift=0.0, noise=0.0)
    darkest = T1.amin(dim=2, keepdim=True)
    ratio = ((t1_of([0, 1, 2], config) - darkest) / (T1 - darkest))[:, 0]
    bright = IS_MEASURED & ((T1 - darkest)[:, 0] > 0.5)
    assert 0.8 - 1e-4 <= ratio[bright].min() < 0.95 < 1.05 < ratio[bright].max() <= 1.2 + 1e-4
    nothing = dataclasses.replace(config, bias=0.0)
    torch.testing.assert_close(t1_of([0, 1, 2], nothing), T1 * IS_MEASURED[:, None])


def test_a_crop_is_one_stretch_of_at_least_its_share_and_dropped_regions_are_whole() -> None:
    config = dataclasses.replace(FUNCTION, noise=0.0)
    values, is_left = series_of([0, 1, 2], config)
    for row, num_frames in enumerate((20, 16, 10)):
        places = torch.nonzero(is_left[row])[:, 0]
        assert num_frames / 2 <= len(places) <= num_frames
        assert int(places[-1] - places[0]) == len(places) - 1
        is_zero = values[row][places] == 0
        assert torch.equal(is_zero.all(dim=0), is_zero.any(dim=0))
        assert 2 < int(is_zero.all(dim=0).sum()) < 18
    whole = FunctionAugmentation(shortest_share=1.0, dropped_regions=0.0, noise=0.0)
    values, is_left = series_of([0, 1, 2], whole)
    assert torch.equal(is_left, IS_FRAME)
    assert torch.equal(values, SERIES * IS_FRAME[..., None])
