import dataclasses

import numpy as np
import pytest
import torch

from brain_models.atlas import Atlas
from brain_models.encoder import EncoderConfig
from data_sharding.read.reader import WindowBatch
from pretrain.baselines.guesses import BaselineConfig
from pretrain.baselines.references import (
    References,
    fit_references,
    rows_set_aside,
    rows_set_aside_of_rank,
    score_baselines,
    voxel_statistics,
)
from pretrain.errors import MaskingError
from pretrain.masked.costs import DecoderConfig, ModelConfig
from pretrain.masked.masked_set import Geometry, LossConfig, SetSpec
from pretrain.masked.masked_volumes import MaskedVolumes
from pretrain.masked.masking import MaskingConfig
from pretrain.report.scores import Regions, metrics_of, r2_draws, report_of, score_rows
from tests.phantom_spaces import ball
from training.statistics import BootstrapConfig

BATCH_SIZE = 4
INTERVALS = BootstrapConfig(num_resamples=50, confidence=0.95, seed=0)
MODEL = ModelConfig(
    EncoderConfig(width=16, depth=1, num_heads=2, mlp_ratio=2.0, num_frequencies=4, time_in="seconds"),
    DecoderConfig(width=16, depth=1),
)


@pytest.fixture(scope="module")
def geometry() -> Geometry:
    return ball(patch_voxels=3)


def make_task(
    geometry: Geometry, kind: str = "region", loss: str = "plain", sets: tuple[str, ...] = ("bold",)
) -> MaskedVolumes:
    torch.manual_seed(1)
    task = MaskedVolumes(
        MODEL,
        {name: SetSpec("bold", geometry, 1.0) for name in sets},
        masking=MaskingConfig(kind=kind, hidden_share=0.5, rule="any", groups=[], exclude=[]),
        loss=LossConfig(kind=loss, smallest_region=0.25),
        batch_size=BATCH_SIZE,
        weight_decay=0.05,
    )
    torch.nn.init.normal_(task.decoder.predict["bold"].weight, std=0.1)
    generator = torch.Generator().manual_seed(2)
    num_voxels = geometry.space.num_voxels
    task.set_voxel_statistics(
        "bold", torch.randn(num_voxels, generator=generator), torch.rand(num_voxels, generator=generator) + 0.5
    )
    return task


def make_batch(geometry: Geometry, size: int = BATCH_SIZE, seed: int = 3) -> WindowBatch:
    generator = torch.Generator().manual_seed(seed)
    num_voxels = geometry.space.num_voxels
    is_measured = torch.rand(size, num_voxels, generator=generator) < 0.9
    values = torch.randn(size, 4, num_voxels, generator=generator) * is_measured[:, None]
    return WindowBatch(
        values=values,
        is_measured=is_measured,
        repetition_time_s=torch.full((size,), 2.0),
        weight=torch.ones(size),
        sample_seed=torch.arange(size) * 1009 + seed,
        scan_ids=[f"scan{row}" for row in range(size)],
        subjects=[f"subject{row // 2}" for row in range(size)],
        first_frame=[0] * size,
    )


def rows(batch: WindowBatch, chosen: slice) -> WindowBatch:
    return WindowBatch(**{name: getattr(batch, name)[chosen] for name in batch.__dataclass_fields__})


def reference_loss(task: MaskedVolumes, geometry: Geometry, batch: WindowBatch, weight: np.ndarray) -> float:
    """The definition, one hidden voxel at a time, in float64; voxels count as `weight` says."""
    with torch.no_grad():
        masked = task.mask(batch)
        guess = task.guess(masked).hidden.double()
    choice, own = masked.choice, masked.set
    stem, layout = task.encoder.stem("bold"), geometry.layout
    offset, scale = stem.voxel_offset.double(), stem.voxel_scale.double()
    total = 0.0
    for sample in range(len(batch.weight)):
        for number, token in enumerate(choice.hidden[sample].tolist()):
            tubelet, patch = divmod(token, layout.num_patches)
            for frame in range(2):
                for cell, voxel in enumerate(layout.gather[patch]):
                    if voxel == layout.num_voxels or not batch.is_measured[sample, voxel]:
                        continue
                    truth = batch.values[sample, tubelet * 2 + frame, voxel].double()
                    answer = offset[voxel] + scale[voxel] * guess[sample, number, frame * layout.gather.shape[1] + cell]
                    total += float(batch.weight[sample] * weight[voxel] * (answer - truth) ** 2)
    values_per_token = layout.voxels_per_patch.mean() * 2
    return total / (BATCH_SIZE * own.masker.num_hidden * values_per_token)


def test_loss_equals_its_definition_in_a_float64_loop(geometry: Geometry) -> None:
    task, batch = make_task(geometry), make_batch(geometry)
    batch.weight[1] = 0.5
    expected = reference_loss(task, geometry, batch, np.ones(geometry.space.num_voxels))
    assert float(task(batch)["loss"].detach()) == pytest.approx(expected, rel=1e-5)


def test_balanced_loss_weighs_voxels_by_one_over_their_regions_size_in_a_float64_loop(geometry: Geometry) -> None:
    task, batch = make_task(geometry, loss="balanced"), make_batch(geometry)
    labels = geometry.atlas.complete_labels(geometry.space)
    sizes = {label: int((labels == label).sum()) for label in np.unique(labels)}
    median = np.median(list(sizes.values()))
    floor = 0.25 * median
    weight = np.array([1 / max(sizes[label], floor) for label in labels])
    assert sizes[3] == 1
    assert weight.max() <= 4 / median  # the region of one voxel does not explode
    weight /= weight.mean()
    large = [label for label, size in sizes.items() if size >= floor]
    sums = [weight[labels == label].sum() for label in large]
    assert max(sums) == pytest.approx(min(sums))
    expected = reference_loss(task, geometry, batch, weight)
    assert float(task(batch)["loss"].detach()) == pytest.approx(expected, rel=1e-5)
    with torch.no_grad():
        sums = task.predict(batch)
    assert task.metrics(sums)["loss"] == pytest.approx(expected, rel=1e-4)


def test_balanced_loss_has_the_scale_of_the_plain_one_where_all_voxels_are_as_hard(geometry: Geometry) -> None:
    seeds = range(20)
    losses = {}
    for kind in ("plain", "balanced"):
        task = make_task(geometry, kind="random", loss=kind)
        torch.nn.init.zeros_(task.decoder.predict["bold"].weight)
        task.set_voxel_statistics("bold", torch.zeros(geometry.space.num_voxels), torch.ones(geometry.space.num_voxels))
        with torch.no_grad():
            losses[kind] = sum(float(task(make_batch(geometry, seed=seed))["loss"]) for seed in seeds)
    assert losses["balanced"] == pytest.approx(losses["plain"], rel=0.03)


def gradients(task: MaskedVolumes, batches: list[WindowBatch]) -> tuple[float, list[torch.Tensor]]:
    task.zero_grad()
    loss = torch.stack([task(batch)["loss"] for batch in batches]).sum()
    loss.backward()
    return float(loss.detach()), [parameter.grad.clone() for parameter in task.parameters()]


@pytest.mark.parametrize("loss_kind", ["plain", "balanced"])
def test_micro_batches_and_padding_rows_do_not_change_the_update(geometry: Geometry, loss_kind: str) -> None:
    task, batch = make_task(geometry, loss=loss_kind), make_batch(geometry)
    padded = make_batch(geometry, size=6)
    for name in ("values", "is_measured", "sample_seed"):
        getattr(padded, name)[:4] = getattr(batch, name)
    padded.weight[4:] = 0
    whole_loss, whole = gradients(task, [batch])
    for others in ([rows(batch, slice(0, 2)), rows(batch, slice(2, 4))], [padded]):
        loss, found = gradients(task, others)
        assert loss == pytest.approx(whole_loss, rel=1e-5)
        assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(whole, found, strict=True))


def test_voxels_that_were_not_measured_change_neither_loss_nor_gradient(geometry: Geometry) -> None:
    task, batch, other = make_task(geometry), make_batch(geometry), make_batch(geometry)
    other.values += 100 * ~other.is_measured[:, None]
    loss, found = gradients(task, [batch])
    other_loss, other_found = gradients(task, [other])
    assert loss == other_loss
    assert all(torch.equal(one, two) for one, two in zip(found, other_found, strict=True))


def test_hidden_voxels_are_not_seen(geometry: Geometry) -> None:
    task, batch, other = make_task(geometry), make_batch(geometry), make_batch(geometry)
    owner = torch.from_numpy(geometry.layout.patch_of_voxel)
    is_hidden = task.is_hidden(batch)[:, :, owner].repeat_interleave(2, dim=1)
    other.values += 5 * is_hidden
    guesses = [task.guess(task.mask(one)).hidden for one in (batch, other)]
    assert torch.equal(guesses[0], guesses[1])
    assert float(is_hidden.float().mean()) == pytest.approx(0.5, abs=0.1)


def test_prediction_sums_agree_with_the_loss(geometry: Geometry) -> None:
    task, batch = make_task(geometry), make_batch(geometry)
    with torch.no_grad():
        sums, loss = task.predict(batch), task(batch)["loss"]
    assert float(sums["error"].sum()) == pytest.approx(
        float(loss) * BATCH_SIZE * task.set_named("").values_per_sample, rel=1e-4
    )
    assert task.metrics(sums)["loss"] == pytest.approx(float(loss), rel=1e-4)
    voxels = [(geometry.atlas.labels == label).sum() for label in geometry.atlas.region_ids]
    assert sums["count"].shape == (4, len(voxels) + 1)
    assert bool((sums["count"][:, :-1] <= torch.tensor(voxels) * 4).all())


def test_a_batch_may_leave_its_set_unnamed_only_where_there_is_one(geometry: Geometry) -> None:
    alone, joint = make_task(geometry), make_task(geometry, sets=("bold", "fine"))
    assert alone.set_named("").name == alone.set_named("bold").name == "bold"
    assert joint.set_named("fine").name == "fine"
    for task, name in ((alone, "fine"), (joint, "")):
        with pytest.raises(ValueError, match="not in list"):
            task.set_named(name)


def test_a_fresh_decoder_starts_at_the_mean_baseline(geometry: Geometry) -> None:
    task = make_task(geometry)
    torch.nn.init.zeros_(task.decoder.predict["bold"].weight)
    with torch.no_grad():
        sums = task.predict(make_batch(geometry))
    assert torch.allclose(sums["error"], sums["total"], rtol=1e-5)
    assert task.metrics(sums)["r2"] == pytest.approx(0, abs=1e-5)


def test_r2_of_a_perfect_guess_is_one_and_of_the_mean_zero(geometry: Geometry) -> None:
    regions = Regions.of(geometry.atlas)
    total = torch.rand(5, regions.num_columns) + 1
    sums = {"error": torch.zeros_like(total), "total": total, "count": total * 3, "error_ridge": total}
    metrics = metrics_of(sums, regions)
    assert metrics["r2"] == metrics["r2/group/left"] == 1
    assert metrics["r2/ridge"] == 0
    assert "r2/group/absent" not in metrics
    rows = score_rows(sums, regions, subjects=list("abcde"), config=INTERVALS)
    assert report_of(rows, loss=0.0, num_samples=5)["regions"]["octant 3"]["r2"] == 1


def test_r2_pools_sums_over_the_split_and_by_region() -> None:
    atlas = Atlas("two", np.array([4, 9, 9, 0], dtype=np.int32), {4: "four", 9: "nine"}, {"both": [4, 9]})
    regions = Regions.of(atlas)
    assert regions.column_of_voxel.tolist() == [0, 1, 1, 2]
    error = torch.tensor([[1.0, 2.0, 0.0], [0.0, 2.0, 3.0]])
    total = torch.tensor([[2.0, 4.0, 1.0], [2.0, 12.0, 11.0]])
    sums = {"error": error, "total": total, "count": total}
    assert metrics_of(sums, regions)["r2"] == pytest.approx(1 - 8 / 32)
    report = report_of(score_rows(sums, regions, subjects=["a", "b"], config=INTERVALS), loss=2.0, num_samples=2)
    assert report["r2"] == pytest.approx(1 - 8 / 32)
    assert report["groups"]["both"]["r2"] == pytest.approx(1 - 5 / 20)
    assert {name: found["r2"] for name, found in report["regions"].items()} == {
        "four": pytest.approx(0.75),
        "nine": pytest.approx(0.75),
    }


def test_a_region_scored_in_one_subject_only_has_no_interval() -> None:
    total = torch.zeros(10, 49, dtype=torch.float64)
    total[3] = 0.3
    r2 = r2_draws(0.017 / 0.3 * total * torch.arange(1, 50), total, INTERVALS)
    np.testing.assert_allclose(r2[0], 1 - 0.017 * np.arange(1, 50) / 0.3)
    assert np.isnan(r2[1:]).all()


def test_a_budget_out_of_reach_is_refused_before_a_model_is_made(geometry: Geometry) -> None:
    with pytest.raises(MaskingError, match=r"rule 'pure' of the groups \['left'\] reaches \d+"):
        geometry.masker(MaskingConfig(kind="region", hidden_share=0.9, rule="pure", groups=["left"], exclude=[]))


def give_baselines(task: MaskedVolumes, references: References, batches: list[WindowBatch], name: str = "") -> None:
    own = task.set_named(name)
    own.training_mean = references.offset
    own.baselines = score_baselines(references, batches, hidden_tokens=task.is_hidden, by_region=own.by_region)


def references_of(task: MaskedVolumes, geometry: Geometry, batches: list[WindowBatch], **changes: object) -> References:
    config = {"num_neighbours": 3, "drift_degree": 1, "ridge_max_gib": 1.0, "ridge_penalties": [1.0], "fit_samples": 24}
    return fit_references(
        lambda: batches,
        BaselineConfig(**(config | {"choice_share": 0.5} | changes)),
        offset=task.encoder.stem("bold").voxel_offset.clone(),
        patch_of_voxel=torch.from_numpy(geometry.layout.patch_of_voxel),
        centres_mm=torch.from_numpy(geometry.layout.centres_mm),
        hidden_tokens=task.is_hidden,
    )


def test_sets_with_and_without_a_ridge_are_scored_together(geometry: Geometry) -> None:
    task = make_task(geometry, sets=("large", "small"))
    batches = {name: dataclasses.replace(make_batch(geometry), set_name=name) for name in ("large", "small")}
    for name, ridge_max_gib in (("large", 0.0), ("small", 1.0)):
        references = references_of(task, geometry, [batches[name]], ridge_max_gib=ridge_max_gib)
        give_baselines(task, references, [batches[name]], name)
    with torch.no_grad():
        found = [task.predict(batch) for batch in batches.values()]
    assert found[0].keys() == found[1].keys()
    rows = {name: torch.cat([one[name] for one in found]) for name in found[0]}
    metrics = task.metrics(rows)
    error = task.set_named("small").baselines.errors_of(batches["small"].sample_seed)["ridge"].double().sum()
    assert metrics["small/r2/ridge"] == pytest.approx(1 - float(error / found[1]["total"].double().sum()))
    assert "large/r2/ridge" not in metrics
    assert metrics["large/r2/neighbour"] == metrics["small/r2/neighbour"]
    tables = [
        score_rows(own, Regions.of(geometry.atlas), subjects=batches["small"].subjects, config=INTERVALS)
        for _, own in task.by_set(rows).values()
    ]
    assert [list(table[0].r2) for table in tables] == [
        ["model", "neighbour", "global_drift"],
        ["model", "neighbour", "global_drift", "ridge"],
    ]


def test_baseline_scores_are_found_by_sample_and_padding_has_none(geometry: Geometry) -> None:
    task, batch = make_task(geometry), make_batch(geometry, size=6)
    batch.weight[4] = 0
    references = references_of(task, geometry, [batch])
    give_baselines(task, references, [rows(batch, slice(3, 6)), rows(batch, slice(0, 4))])
    baselines = task.set_named("").baselines
    order = torch.tensor([5, 0, 3])
    errors = references.squared_errors(batch, task.is_hidden(batch))
    assert baselines.has(batch.sample_seed).tolist() == [True, True, True, True, False, True]
    for name, found in baselines.errors_of(batch.sample_seed[order]).items():
        torch.testing.assert_close(found, task.set_named("").by_region(errors[name])[order])


def test_a_sample_that_the_baselines_could_not_be_scored_on_is_left_out_and_said(
    geometry: Geometry, caplog: pytest.LogCaptureFixture
) -> None:
    task, batch = make_task(geometry), make_batch(geometry)
    give_baselines(task, references_of(task, geometry, [batch]), [rows(batch, slice(0, 3))])
    with torch.no_grad():
        sums = task.predict(batch)
    alone = {name: values[:3] for name, values in sums.items()}
    assert task.metrics(sums) == task.metrics(alone)
    assert "1 of 4 samples of set bold are left out" in caplog.text


def test_references_are_scored_on_the_voxels_of_the_model(geometry: Geometry) -> None:
    task = make_task(geometry, kind="random")
    training = [make_batch(geometry, size=8, seed=seed) for seed in range(3)]
    for batch in training:  # one signal in the whole brain: the ridge must find it
        batch.values = (batch.values * 0.1 + torch.randn(8, 4, 1)) * batch.is_measured[:, None]
    statistics = voxel_statistics(training, geometry.space.num_voxels)
    task.set_voxel_statistics("bold", statistics.mean, statistics.deviation(0.1))
    references = references_of(task, geometry, training, ridge_penalties=[1e-3, 1e2], choice_share=0.25)
    give_baselines(task, references, training)
    assert references.penalty == 1e-3
    with torch.no_grad():
        metrics = task.metrics(task.predict(training[0]))
    assert metrics["r2/ridge"] > 0.95
    assert metrics["r2/neighbour"] > 0.9
    assert metrics["r2/global_drift"] > 0.9
    assert metrics["r2"] < 0.5
    of_own_mean = task.predict(training[0])
    task.set_voxel_statistics("bold", statistics.mean + 3, statistics.deviation(0.1))  # as registered weights bring
    total = task.predict(training[0])["total"]  # the mean that scores 0 is this run's
    torch.testing.assert_close(total, of_own_mean["total"], rtol=1e-3, atol=1e-3)


def test_padding_rows_are_no_part_of_the_voxel_statistics(geometry: Geometry) -> None:
    batch = make_batch(geometry, size=6)
    batch.weight[4:] = 0
    padded = voxel_statistics([batch], geometry.space.num_voxels)
    alone = voxel_statistics([rows(batch, slice(0, 4))], geometry.space.num_voxels)
    assert torch.equal(padded.mean, alone.mean)
    assert torch.equal(padded.deviation(0.1), alone.deviation(0.1))


def test_a_ridge_that_needs_too_much_memory_is_left_out_and_said(
    geometry: Geometry, caplog: pytest.LogCaptureFixture
) -> None:
    task, batch = make_task(geometry), make_batch(geometry)
    references = references_of(task, geometry, [batch], ridge_max_gib=1e-6)
    guesses = references.guess(batch.values, batch.is_measured, task.is_hidden(batch))
    assert guesses.keys() == {"neighbour", "global_drift"}
    assert "the ridge baseline is left out" in caplog.text


def test_errors_of_chosen_patches_are_those_of_the_mask_that_hides_them(geometry: Geometry) -> None:
    task, batch = make_task(geometry), rows(make_batch(geometry), slice(0, 1))
    hidden = task.is_hidden(batch)[0, 0]
    with torch.no_grad():
        sums = task.predict(batch)
        errors, total = task.patch_errors(batch, hidden)
    assert float(errors.sum()) == pytest.approx(float(sums["error"].sum()), rel=1e-4)
    assert float(total[:, hidden].sum()) == pytest.approx(float(sums["total"].sum()), rel=1e-4)
    assert not errors[:, ~hidden].any()


def test_rows_set_aside_are_whole_subjects() -> None:
    subjects = [f"s{number}" for number in (3, 1, 2, 3, 0, 4, 4)]
    assert rows_set_aside(subjects, 0.4).tolist() == [True, False, False, True, False, True, True]
    assert rows_set_aside(["one"] * 5, 0.2).tolist() == [False] * 4 + [True]


def test_ranks_set_the_rows_aside_that_one_rank_would() -> None:
    for subjects in ([f"s{number}" for number in (3, 1, 2, 3, 0, 4, 4)], ["one"] * 5):
        alone = rows_set_aside(subjects, 0.4).tolist()
        for world_size in (1, 2, 3, 9):
            dealt = [subjects[rank::world_size] for rank in range(world_size)]
            found = [rows_set_aside_of_rank(dealt, 0.4, rank=rank).tolist() for rank in range(world_size)]
            assert found == [alone[rank::world_size] for rank in range(world_size)]
