"""ADHD classification: it finds an effect that is there, none that is not, and unfreezes from the head down."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from phantom_runs import PhantomRuns, RunSource, make_batch, make_population, make_runs
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from brain_models.encoder import EncoderConfig
from configs.entry import compose
from configs.parse import parse
from data_sharding.phantoms.study.population import Population
from finetune.config import FinetuneConfig
from finetune.errors import FinetuneError
from finetune.tasks import parse_task
from finetune.tasks.subject_prediction.config import Config
from finetune.tasks.subject_prediction.labels import Labels, read_labels
from finetune.tasks.subject_prediction.outcomes import class_weights
from finetune.tasks.subject_prediction.probe import ProbeConfig, principal_channels, start_head
from finetune.tasks.subject_prediction.scores import CLASS_METRICS
from finetune.tasks.subject_prediction.study import make_outcome
from finetune.tasks.subject_prediction.task import NO_LABEL, SubjectPrediction, build_model
from tests.bundles import cubes, encoder_bundle
from training.engine.plain import PlainEngine
from training.loop import FitResult, Services, fit

NUM_TRAIN, NUM_VALIDATION, NUM_TEST = 60, 16, 104
ENCODER = EncoderConfig(width=32, depth=2, num_heads=2, mlp_ratio=2.0, num_frequencies=8, time_in="seconds")


@cache
def population() -> Population:
    return make_population()


@cache
def phantom(seed: int, effect_size: float, num_subjects: int) -> PhantomRuns:
    return make_runs(population(), seed=seed, num_subjects=num_subjects, effect_size=effect_size)


def make_config(folder: Path, *overrides: str) -> FinetuneConfig:
    """configs/finetune.yaml, a few steps in one process without a tracking server."""
    fixed = [
        "shards=unused",
        "encoder=unused",
        f"run.folder={folder}/run",
        f"run.scratch={folder}/scratch",
        "engine=plain",
        "cluster=inline",
        "train.steps=6",
        "tracking=null",
        "train.evaluation.every_steps=3",
        "train.checkpoint.every_steps=3",
        "train.evaluation.final_splits=[test]",
        "train.choose=last",
        "task.unfreezing.first_layer_opens_at_step=2",
        "task.unfreezing.steps_per_layer=1",
        "task.head.num_channels=4",
    ]
    return parse(compose("finetune", fixed + list(overrides)), FinetuneConfig)


def make_task(runs: PhantomRuns, config: FinetuneConfig, seed: int) -> SubjectPrediction:
    torch.manual_seed(seed)
    backbone = encoder_bundle(ENCODER, {"bold": cubes(runs.space, 3)})
    labels = Labels(
        {run.subject: run.is_case for run in runs.runs}, {run.subject: run.site for run in runs.runs}, num_unlabelled=0
    )
    task = parse_task(config.task, Config)
    return SubjectPrediction(
        build_model(backbone, task.head, runs.atlas),
        labels,
        make_outcome(task, labels, [run.subject for run in runs.runs[:NUM_TRAIN]]),
        num_windows=task.num_windows,
        head_learning_rate_scale=task.head_learning_rate_scale,
        unfreezing=task.unfreezing,
        weight_decay=task.weight_decay,
        batch_size=config.data.batch_size,
    )


def fine_tune(runs: PhantomRuns, config: FinetuneConfig, seed: int) -> tuple[SubjectPrediction, FitResult]:
    """Probe, then a few steps with the encoder opening: the calls of finetune.train, on runs in memory."""
    task = make_task(runs, config, seed)
    splits = {
        "train": runs.runs[:NUM_TRAIN],
        "validation": runs.runs[NUM_TRAIN : NUM_TRAIN + NUM_VALIDATION],
        "test": runs.runs[NUM_TRAIN + NUM_VALIDATION :],
    }
    source = RunSource(splits, batch_size=config.data.batch_size, seed=seed)
    probe = parse_task(config.task, Config).probe
    assert probe is not None
    batches = source.evaluation("train", limit=None)
    start_head(task.model, batches, labels=task.labels, outcome=task.outcome, config=probe)
    services = Services(config.run, config, export=None)
    return task, fit(task, source, config.train, services)


@pytest.mark.demo
def test_without_an_effect_the_mean_auroc_of_three_seeds_is_at_chance(tmp_path: Path) -> None:
    num_subjects = NUM_TRAIN + NUM_VALIDATION + NUM_TEST
    found = []
    for seed in (31, 32, 33):
        config = make_config(tmp_path / str(seed))
        task, result = fine_tune(phantom(seed, 0.0, num_subjects), config, seed)
        scores = task.scores(result.evaluations["test"].predictions)
        assert len(scores.subjects) == NUM_TEST
        found.append([metric.value(scores) for metric in CLASS_METRICS[:2]])
    assert np.abs(np.mean(found, axis=0) - 0.5).max() <= 0.08, found


def test_an_effect_that_is_there_is_found_on_held_out_subjects(tmp_path: Path) -> None:
    runs = phantom(34, 1.0, NUM_TRAIN + NUM_VALIDATION + NUM_TEST)
    task, result = fine_tune(runs, make_config(tmp_path), 34)
    scores = task.scores(result.evaluations["test"].predictions)
    assert CLASS_METRICS[0].value(scores) >= 0.7


def test_head_moves_first_then_blocks_from_the_top_each_slower(tmp_path: Path) -> None:
    config = make_config(tmp_path, "task.unfreezing.steps_per_layer=2", "train.schedule.warmup_steps=0")
    runs = phantom(31, 0.0, NUM_TRAIN + NUM_VALIDATION + NUM_TEST)
    task = make_task(runs, config, 0)
    torch.nn.init.normal_(task.model.head.linear.weight, std=0.1)
    groups = {group.name: group for group in task.parameter_groups()}
    opens = {name: group.opens_at for name, group in groups.items() if "/" not in name}
    assert opens == {"head": 0, "encoder.1": 2, "encoder.0": 4, "encoder.stem": 6}
    scales = [groups[name].learning_rate_scale for name in opens]
    assert scales == pytest.approx([0.1, 0.5, 0.35, 0.245])

    engine = PlainEngine(task, config.train)
    batch = make_batch(runs.runs[:4])
    moved = []
    for step in range(6):
        before = {name: value.clone() for name, value in task.model.state_dict().items()}
        engine.begin(step)
        engine.backward(engine.losses(batch)["loss"])
        engine.step()
        changed = {name for name, value in task.model.state_dict().items() if not torch.equal(value, before[name])}
        moved.append({".".join(name.split(".")[:3]) for name in changed if name.startswith("encoder.blocks")})
    assert moved == [set()] * 2 + [{"encoder.blocks.1"}] * 2 + [{"encoder.blocks.0", "encoder.blocks.1"}] * 2


@pytest.fixture
def small(tmp_path: Path) -> tuple[SubjectPrediction, PhantomRuns]:
    runs = phantom(31, 0.0, NUM_TRAIN + NUM_VALIDATION + NUM_TEST)
    task = make_task(runs, make_config(tmp_path, "task.head.dropout=0.0"), 0)
    torch.nn.init.normal_(task.model.head.linear.weight, std=0.1)
    return task, runs


def test_losses_of_micro_batches_add_up_to_the_loss_of_the_step(small: tuple[SubjectPrediction, PhantomRuns]) -> None:
    task, runs = small
    whole = task(make_batch(runs.runs[:6]))["loss"]
    parts = task(make_batch(runs.runs[:2]))["loss"] + task(make_batch(runs.runs[2:6]))["loss"]
    torch.testing.assert_close(whole, parts)


def test_a_subject_without_a_label_reaches_neither_loss_nor_metrics(
    small: tuple[SubjectPrediction, PhantomRuns],
) -> None:
    task, runs = small
    chosen = runs.runs[:6]
    stranger = dataclasses.replace(chosen[0], subject="pending")
    padding = make_batch(chosen[:1])
    padding.weight[:] = 0
    torch.testing.assert_close(task(make_batch([*chosen, stranger]))["loss"], task(make_batch(chosen))["loss"])
    assert task(make_batch([stranger]))["loss"].item() == 0.0
    assert task(padding)["loss"].item() == 0.0
    task.eval()
    with torch.no_grad():
        predictions = task.predict(make_batch([*chosen, stranger]))
    assert predictions["subject"][-1] == NO_LABEL
    assert task.scores(predictions).subjects == tuple(sorted(run.subject for run in chosen))


def test_two_runs_of_a_subject_give_one_score_their_mean(small: tuple[SubjectPrediction, PhantomRuns]) -> None:
    task, _ = small
    first = task.number_of_subject["0001"]
    predictions = {"output": torch.tensor([1.0, 2.0]), "subject": torch.tensor([first, first])}
    assert task.scores(predictions).values.tolist() == [1.5]


def test_the_analytic_cost_is_what_torch_counts_up_to_head_and_positions(
    small: tuple[SubjectPrediction, PhantomRuns],
) -> None:
    task, runs = small
    batch = make_batch(runs.runs[:2])
    for is_open in (True, False):
        task.model.encoder.requires_grad_(is_open)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # it knows no flash on a CPU
            task(batch)["loss"].backward()
        assert task.cost(batch).flops == pytest.approx(counter.get_total_flops(), rel=0.15)


def test_recomputed_activations_change_no_gradient(small: tuple[SubjectPrediction, PhantomRuns]) -> None:
    task, runs = small
    batch = make_batch(runs.runs[:2])
    gradients = []
    for is_recomputing in (False, True):
        if is_recomputing:
            task.checkpoint_activations()
        task.zero_grad()
        task(batch)["loss"].backward()
        parameters = dict(task.named_parameters())
        gradients.append({name: each.grad.clone() for name, each in parameters.items() if each.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())


def test_class_weights_let_both_classes_count_alike() -> None:
    labels = Labels({"a": True, "b": False, "c": False, "d": False}, dict.fromkeys("abcd", "x"), 0)
    control, case = class_weights(labels, ["a", "b", "c", "d", "unlabelled"])
    assert 3 * control == pytest.approx(case)
    assert 3 * control + case == pytest.approx(4)


def test_principal_channels_are_the_directions_of_largest_variance() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(500, 6, generator=generator) * torch.tensor([1.0, 5.0, 1.0, 3.0, 1.0, 1.0])
    channels = principal_channels(tokens.T @ tokens / 500, 2)
    projected = tokens @ channels.T
    assert int(channels[0].abs().argmax()) == 1
    assert int(channels[1].abs().argmax()) == 3
    assert float(projected[:, 0].square().mean()) == pytest.approx(1.0, rel=1e-4)


def test_a_probed_head_has_the_channels_of_the_first_runs_and_tells_the_labelled_subjects_apart(
    small: tuple[SubjectPrediction, PhantomRuns],
) -> None:
    task, runs = small
    chosen, head = runs.runs[:16], task.model.head
    stranger = dataclasses.replace(chosen[0], subject="pending")
    padded = make_batch([*chosen[8:], stranger, chosen[0]])
    padded.weight[-1] = 0
    config = ProbeConfig(strengths=[1e3], num_folds=2, num_runs_for_channels=3, seed=0)
    batches = [make_batch(chosen[:8]), padded]
    start_head(task.model, batches, labels=task.labels, outcome=task.outcome, config=config)

    task.eval()
    batch = make_batch(chosen)
    with torch.no_grad():
        tokens = task.model.tokens(batch.values, batch.is_measured, batch.repetition_time_s)
        nodes = head.pool.node_tokens(tokens[:3]).flatten(0, 2).double()
        features, outputs = head.pool(tokens), task.outputs(batch)
    _, directions = np.linalg.eigh((nodes.T @ nodes).numpy())
    channels = torch.nn.functional.normalize(head.pool.project.weight.detach(), dim=1).numpy()
    np.testing.assert_allclose(np.abs(channels @ directions[:, ::-1][:, :4]), np.eye(4), atol=0.02)
    # Of the 16 labelled subjects: neither of the one without a label nor of padding, which repeat a run.
    torch.testing.assert_close(head.centre, features.mean(dim=0), atol=1e-4, rtol=1e-4)
    is_case = torch.tensor([run.is_case for run in chosen])
    assert 3 < int(is_case.sum()) < 13
    assert float(outputs[is_case].min()) > 0 > float(outputs[~is_case].max())


def test_labels_that_are_not_there_are_named(tmp_path: Path) -> None:

    config = parse_task(make_config(tmp_path).task, Config).label
    table = pd.DataFrame({"diagnosis": ["ADHD", "pending", "control", None], "site": list("aabb")}, index=list("wxyz"))
    labels = read_labels(table, config, location="set")
    assert labels.truth_of == {"w": True, "y": False}
    assert labels.num_unlabelled == 2
    with pytest.raises(FinetuneError, match=r"no column 'diagnosis' \(columns: DX\); set task.label.column"):
        read_labels(table.rename(columns={"diagnosis": "DX"})[["DX"]], config, location="set")
    with pytest.raises(FinetuneError, match=r"0 controls .* it holds: ADHD, pending"):
        read_labels(table.iloc[:2], config, location="set")
