"""What a run reports: region contribution, probes, sentinels, intervals, maps. Positive and negative controls."""

import csv
import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
import torch

from brain_models.atlas import Atlas
from brain_models.space import NO_TEMPLATE
from configs.entry import compose
from configs.parse import parse
from pretrain.baselines.guesses import RidgeOracle
from pretrain.masked.config import PretrainConfig
from pretrain.report.collapse import SentinelConfig, Sentinels, collapses, effective_rank, variance
from pretrain.report.config import ConfoundProbeConfig, ContributionConfig, report_problems
from pretrain.report.contribution import Contribution, Experiment, contexts, contributions
from pretrain.report.maps import VoxelMaps, write_nifti
from pretrain.report.pictures import Example, draw_contributions, draw_courses, draw_example, draw_maps
from pretrain.report.probes import by_subject, probe, same_question
from pretrain.report.scores import Regions, RegionScore, as_csv, score_rows
from pretrain.report.sections import region_section, score_section
from tests.phantom_spaces import ball
from training.config import TrackingConfig
from training.statistics import BootstrapConfig, Interval
from training.watch.tracking import log_folder

INTERVALS = BootstrapConfig(num_resamples=200, confidence=0.95, seed=0)
PATCHES, SIZE, WINDOWS, FRAMES = 72, 3, 48, 6
PROBES = ConfoundProbeConfig(num_samples=1, num_folds=4, num_permutations=12, seed=0)


def windows(seed: int, *, coupled: list[int], num_windows: int) -> torch.Tensor:
    """Patch means of regions of three patches: noise, and one signal that the coupled regions share."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(num_windows, FRAMES, PATCHES, generator=generator)
    shared = torch.randn(num_windows, FRAMES, 1, generator=generator)
    for region in coupled:
        values[:, :, region * SIZE : (region + 1) * SIZE] += 1.2 * shared
    return values


def contributions_of(seed: int, coupled: list[int]) -> list[Contribution]:
    """By a ridge that learnt from other windows; patches lie in a row, so that regions are neighbours."""
    ridge = RidgeOracle(PATCHES, PATCHES)
    training, seen = (
        windows(seed + part, coupled=coupled, num_windows=count) for part, count in ((0, 400), (1, WINDOWS))
    )
    ridge.add(training, training)

    def errors(is_hidden: np.ndarray) -> np.ndarray:
        frames = seen.reshape(-1, PATCHES)
        guess = ridge.predict(frames, torch.from_numpy(~is_hidden), penalty=0.1)
        squared = (guess - frames).square().reshape(WINDOWS, FRAMES, PATCHES).sum(dim=1).double().numpy()
        return squared * is_hidden

    regions = {f"region {region}": np.arange(region * SIZE, (region + 1) * SIZE) for region in range(PATCHES // SIZE)}
    hidden = contexts(list(regions.values()), PATCHES, num_contexts=4, seed=seed)
    place = np.arange(PATCHES, dtype=float)
    return contributions(
        Experiment(errors, seen.square().sum(dim=1).double().numpy(), hidden),
        regions,
        np.abs(place[:, None] - place[None]),
        subjects=[f"subject {window // 4}" for window in range(WINDOWS)],
        config=ContributionConfig(WINDOWS, 4, 12, 2999, 0.1, seed),
        intervals=INTERVALS,
    )


def test_the_regions_of_a_coupled_network_contribute_and_no_other() -> None:
    coupled = [2, 9, 15, 21]
    rows = contributions_of(7, coupled)
    found = {row.region for row in rows if row.is_significant}
    assert found == {f"region {region}" for region in coupled}
    for row in rows:
        assert row.num_contexts == 2
        assert (row.contribution.low > 0) == (row.region in found)


def test_in_independent_noise_no_region_stands_out_and_p_is_uniform() -> None:
    rows = [row for seed in (100, 200, 300) for row in contributions_of(seed, [])]
    p_values = np.sort([row.p for row in rows])
    uniform = np.arange(1, len(p_values) + 1) / len(p_values)
    assert np.abs(p_values - uniform).max() < 1.36 / np.sqrt(len(p_values) / 3)  # regions share their null sets
    assert not any(row.is_significant for row in rows)
    assert max(abs(row.contribution.value) for row in rows) < 0.01


def test_every_region_is_visible_in_half_of_the_contexts() -> None:
    regions = [np.array([0]), np.array([1, 2, 3]), np.array([4, 5]), np.array([6, 7, 8, 9])]
    found = contexts(regions, 10, num_contexts=6, seed=3)
    for patches in regions:
        assert [is_hidden[patches].all() for is_hidden in found].count(True) == 3
        assert [is_hidden[patches].any() for is_hidden in found].count(True) == 3
    assert all(2 <= is_hidden.sum() <= 8 for is_hidden in found)


def test_a_region_without_a_patch_is_not_tested_and_says_why() -> None:
    hidden = [np.array([True, False]), np.array([False, True])]
    experiment = Experiment(lambda is_hidden: np.ones((2, 2)) * is_hidden, np.ones((2, 2)), hidden)
    config = ContributionConfig(2, 2, 3, 9, 0.05, 0)
    regions = {"speck": np.array([], dtype=int)}
    (row,) = contributions(
        experiment, regions, np.zeros((2, 2)), subjects=["a", "b"], config=config, intervals=INTERVALS
    )
    assert (row.p, row.reason) == (None, "no patch is mostly of this region")
    assert np.isnan(row.contribution.value)


def test_a_label_in_the_embedding_is_read_and_one_that_is_not_gives_chance() -> None:
    generator = np.random.default_rng(0)
    site = ["a", "b", "c"] * 16
    embeddings = generator.normal(size=(48, 10))
    embeddings[:, 0] += 4 * np.array([0, 1, 2] * 16)
    found = probe(embeddings, site, PROBES)
    assert found.balanced_accuracy > 0.8
    assert found.p == pytest.approx(1 / 13)
    blind = probe(generator.normal(size=(48, 10)), site, PROBES)
    assert blind.permuted_low <= blind.balanced_accuracy <= blind.permuted_high
    assert blind.chance == pytest.approx(1 / 3)
    assert blind.permuted_low < blind.chance < blind.permuted_high


def test_one_site_or_too_few_subjects_give_no_number_but_the_reason() -> None:
    rows = np.zeros((12, 3))
    for labels, reason in (
        (["a"] * 12, "one value only: a"),
        ([None] * 12, "not known of any subject"),
        (["a"] * 10 + ["b"] * 2, "fewer than two values with 4 subjects or more: a (10), b (2)"),
    ):
        found = probe(rows, labels, PROBES)
        assert (found.balanced_accuracy, found.p, found.reason) == (None, None, reason)


def test_labels_that_divide_subjects_alike_are_known_as_one_question() -> None:
    assert same_question({"site": ["x", "y", "x"], "time": ["2", "1", "2"]})
    assert not same_question({"site": ["x", "y", "z"], "time": ["2", "1", "2"]})
    names, means = by_subject(np.array([[1.0], [2.0], [5.0]]), ["b", "a", "b"])
    assert (names, means.tolist()) == (["a", "b"], [[2.0], [3.0]])


def test_effective_rank_counts_directions_and_falls_to_0_when_all_are_one_vector() -> None:
    generator = torch.Generator().manual_seed(0)
    orthogonal = torch.linalg.qr(torch.randn(64, 8, generator=generator)).Q
    centred = orthogonal - orthogonal.mean(dim=0)
    assert effective_rank(10 * centred + 3) == pytest.approx(8, abs=0.2)
    line = torch.randn(64, 1, generator=generator) @ torch.randn(1, 8, generator=generator)
    assert effective_rank(line) == pytest.approx(1, abs=1e-3)
    assert effective_rank(torch.full((64, 8), 1.7)) == 0
    assert variance(torch.full((64, 8), 1.7)) == 0
    noise = torch.randn(64, 200, generator=generator)
    assert effective_rank(noise) == pytest.approx(effective_rank(noise.T[:, :64].T), rel=1e-6)
    assert variance(noise) == pytest.approx(1, abs=0.05)


def test_a_collapsed_embedding_is_flagged_by_name_and_a_living_one_is_not(caplog: pytest.LogCaptureFixture) -> None:
    generator = torch.Generator().manual_seed(0)
    alive = {"pooled": torch.randn(40, 12, generator=generator), "token": torch.randn(40, 3, 12, generator=generator)}
    config = SentinelConfig(tokens_per_sample=3, min_rank_share=0.2, min_variance_share=0.05)
    sentinels = Sentinels(config, {"rest": Sentinels(config, {}).metrics("rest", alive)})
    assert sentinels.metrics("rest", alive)["embedding_collapsed"] == 0
    assert not caplog.text
    dead = {name: 0.01 * values[:1].expand_as(values) + 1e-4 * values for name, values in alive.items()}
    found = sentinels.metrics("rest", dead)
    assert found["embedding_collapsed"] == 1
    assert "the embedding of rest is collapsing: embedding_variance" in caplog.text


def test_rank_and_variance_have_a_limit_each() -> None:
    config = SentinelConfig(tokens_per_sample=3, min_rank_share=0.2, min_variance_share=0.05)
    untrained = {"embedding_rank": 12.0, "embedding_variance": 4.0}
    for values, expected in (
        ((2.5, 0.21), []),
        ((2.3, 0.21), ["embedding_rank 2.3 is below 0.2 of the untrained encoder's 12"]),
        ((2.5, 0.19), ["embedding_variance 0.19 is below 0.05 of the untrained encoder's 4"]),
    ):
        assert collapses(dict(zip(untrained, values, strict=True)), untrained, config) == expected


def test_intervals_are_over_subjects_and_gains_are_paired() -> None:
    regions = Regions.of(Atlas("one", np.array([4, 4], dtype=np.int32), {4: "four"}, {}))
    generator = torch.Generator().manual_seed(1)
    difficulty = (torch.rand(30, 1, generator=generator) * 5).repeat_interleave(2, dim=0)
    total = torch.cat([torch.full((60, 1), 10.0), torch.zeros(60, 1)], dim=1)
    error = torch.cat([difficulty, torch.zeros(60, 1)], dim=1)
    subjects = [f"s{row // 2}" for row in range(60)]
    sums = {"error": error, "total": total, "count": total, "error_ridge": error + 0.1 * total}
    whole, region = score_rows(sums, regions, subjects=subjects, config=INTERVALS)
    assert (whole.num_subjects, region.name, region.r2) == (30, "four", whole.r2)
    model, gain = whole.r2["model"], whole.gain["ridge"]
    assert model.value == pytest.approx(1 - float(error.sum() / total.sum()))
    assert model.low < model.value < model.high
    assert model.high - model.low == pytest.approx(2 * 1.96 * float(difficulty.std()) / 10 / np.sqrt(30), rel=0.2)
    assert (gain.value, gain.low, gain.high) == pytest.approx((0.1, 0.1, 0.1))  # the same for every subject
    alone = score_rows(sums, regions, subjects=["one"] * 60, config=INTERVALS)[0].r2["model"]
    assert np.isnan([alone.low, alone.high]).all()
    lines = list(csv.DictReader(io.StringIO(as_csv({"test": {"rest": [whole, region]}}, {"rest": "affine (preview)"}))))
    assert float(lines[1]["gain_over_ridge"]) == pytest.approx(0.1, abs=1e-6)
    assert [line["scope"] for line in lines] == ["all", "region"]
    assert {line["alignment"] for line in lines} == {"affine (preview)"}


def test_maps_are_written_in_the_sets_space_and_drawn(tmp_path: Path) -> None:
    import nibabel

    geometry = ball(patch_voxels=3)
    space, num_voxels = dataclasses.replace(geometry.space, template="NLin6Asym"), geometry.space.num_voxels
    r2 = np.linspace(-0.2, 0.8, num_voxels)
    r2[7] = np.nan
    write_nifti(r2, space, tmp_path / "r2.nii.gz")
    image = nibabel.load(tmp_path / "r2.nii.gz")
    assert np.allclose(image.affine, space.affine)
    assert (int(image.header["sform_code"]), int(image.header["qform_code"])) == (4, 4)  # MNI 152
    write_nifti(r2, dataclasses.replace(space, template=NO_TEMPLATE), tmp_path / "cube.nii.gz")
    assert int(nibabel.load(tmp_path / "cube.nii.gz").header["sform_code"]) == 1
    found = np.asarray(image.dataobj)[tuple(space.voxel_indices.T)]
    assert np.allclose(found, r2, equal_nan=True)
    assert np.isnan(np.asarray(image.dataobj)).sum() == np.prod(space.grid_shape) - num_voxels + 1
    maps = VoxelMaps(r2, np.abs(r2), np.ones(num_voxels), 3)
    draw_maps(maps, space, geometry.atlas.labels, title="a ball", path=tmp_path / "maps.png")
    row = Contribution("octant 1", 4, 2, Interval(0.1, 0.05, 0.15), 0.01, 0.9, 0.01, True, "")
    draw_contributions([row], title="a ball", path=tmp_path / "bars.png")
    for name in ("maps.png", "bars.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_the_page_says_who_won_where_and_why_a_linear_map_can() -> None:
    def score(scope: str, name: str, model: float, gain: tuple[float, float, float]) -> RegionScore:
        r2 = {"model": Interval(model, model - 0.1, model + 0.1), "ridge": Interval(0.6, 0.5, 0.7)}
        return RegionScore(scope, name, 4, 100, r2, {"ridge": Interval(*gain)})

    rows = [score("all", "", 0.5, (-0.1, -0.15, -0.05))]
    rows += [score("region", f"r{number}", number / 100, (0.0, -0.1, 0.1)) for number in range(30)]
    section = score_section({"test": {"rest": rows}})
    assert section.table[1:] == [
        ["test", "rest", "model", "0.500 [0.400, 0.600]", "", "4"],
        ["test", "rest", "ridge", "0.600 [0.500, 0.700]", "-0.100 [-0.150, -0.050]", "4"],
        ["test", "rest", "training mean", "0.000", "", "4"],
    ]
    assert "linearly from the visible ones" in section.text
    won = score_section({"test": {"rest": [score("all", "", 0.7, (0.1, 0.05, 0.15))]}})
    assert "linearly" not in won.text
    regions = region_section("rest", rows)
    assert [row[0] for row in regions.table[1:]] == [f"r{n}" for n in (*range(29, 19, -1), *range(9, -1, -1))]
    assert regions.table[1] == ["r29", "0.290 [0.190, 0.390]", "ridge 0.600 [0.500, 0.700]", "+0.000 [-0.100, +0.100]"]
    assert "of 30 regions" in regions.text


def test_an_example_shows_what_was_hidden_and_the_courses_of_the_largest_hidden_regions() -> None:
    geometry = ball(patch_voxels=3)
    labels = geometry.atlas.labels
    is_hidden = np.zeros((5, len(labels)), dtype=bool)
    first, second, third, *_ = geometry.atlas.names
    is_hidden[:, np.isin(labels, [first, second])] = True
    truth = np.random.default_rng(0).normal(size=is_hidden.shape)
    example = Example(truth, 0.5 * truth, is_hidden, 2.0, labels, geometry.atlas.names)
    courses = draw_courses(example)
    shown = [geometry.atlas.names[label] in courses for label in (first, second, third)]
    assert shown == [True, True, False]
    assert draw_example(example, geometry.space).startswith('<img alt="one frame: original, visible, and')


def test_numbers_that_cannot_be_meant_are_refused_by_key() -> None:
    overrides = ["kind=bold", "shards=a", "run.folder=b", "report.probes.num_folds=1", "report.intervals.confidence=95"]
    config = parse(compose("pretrain", overrides), PretrainConfig)
    assert report_problems(config.report) == [
        "report.probes.num_folds: 1; give at least 3",
        "report.intervals.confidence: 95.0; give a share between 0 and 1",
    ]


def test_a_tracking_server_that_fails_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "table.csv").write_text("a\n")
    config = TrackingConfig(1, "http://127.0.0.1:1", "x", group_norms=False, timeout_s=1, drain_s=1)
    assert not log_folder(tmp_path, name="report", run_id="none", config=config)
    assert "did not take the files" in caplog.text
