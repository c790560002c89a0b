"""Cells become readings, readings become tables: without training anything."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from cluster.storage.stores import LocalStore
from configs.entry import compose
from configs.parse import parse
from finetune.compare.cells import Cell, arms_of, cell_config, cells_of
from finetune.compare.comparison import Answer, Comparison, as_markdown, compare, draw, metric_of, read_answer, readings
from finetune.compare.planning import metric_problems
from finetune.config import CompareConfig
from finetune.errors import FinetuneError
from finetune.tasks.subject_prediction import planning as subject_planning
from finetune.tasks.subject_prediction.planning import pair_problems
from finetune.tasks.subject_prediction.scores import CLASS_METRICS, Scores, scores_table
from finetune.tasks.subject_prediction.study import MODEL
from training.checkpoint import file_sha256
from training.errors import TrainingError
from training.grid import GridRun, is_finished
from training.identity import config_hash

NUM_SUBJECTS = 48
TWO_SEEDS = "{random:[r0@x,r1@x],region:[g0@x,g1@x],tube:[t0@x,t1@x]}"


def make_config(*overrides: str, encoders: str = TWO_SEEDS) -> CompareConfig:
    fixed = ["shards=a", f"encoders={encoders}", "run.folder=b", "seeds=[3,4,5]", "bootstrap.num_resamples=200"]
    return parse(compose("finetune.compare", [*fixed, *overrides]), CompareConfig)


def make_answer(cell: Cell, strength: float) -> Answer:
    generator = np.random.default_rng([len(cell.arm), cell.number, cell.seed])
    is_case = np.arange(NUM_SUBJECTS) // 3 % 2 == 0
    names = tuple(f"s{index:02d}" for index in range(NUM_SUBJECTS))
    sites = np.tile(["a", "b", "c"], NUM_SUBJECTS // 3)
    values = strength * is_case + np.random.default_rng(0).normal(size=NUM_SUBJECTS)
    scores = Scores(names, values + 0.2 * generator.normal(size=NUM_SUBJECTS), is_case, sites)
    return Answer({MODEL: scores, "site alone": Scores(names, np.zeros(NUM_SUBJECTS), is_case, sites)}, 0)


def make_answers(config: CompareConfig, strengths: dict[str, float]) -> dict[Cell, Answer]:
    return {cell: make_answer(cell, strengths[cell.arm]) for cell in cells_of(config)}


@pytest.fixture(scope="module")
def found() -> Comparison:
    config = make_config()
    answers = make_answers(config, {"random": 0.5, "region": 2.0, "tube": 0.5})
    unknown = next(cell for cell in answers if cell.arm == "tube")
    return compare(config, answers | {unknown: dataclasses.replace(answers[unknown], num_seen=None)})


def test_units_are_encoders_where_an_arm_has_several_and_seeds_where_it_has_one() -> None:
    several = make_config()
    answers = make_answers(several, dict.fromkeys(arms_of(several), 1.0))
    table = readings(answers, "full")["region"]
    assert [len(repeats) for repeats in table] == [3, 3]
    assert table[1][2] is answers[Cell("region", 1, "g1@x", "full", 5)].trained
    one = make_config(encoders="[a@x,b@x]")
    table = readings(make_answers(one, dict.fromkeys(arms_of(one), 1.0)), "probe")["b@x"]
    assert [len(repeats) for repeats in table] == [1, 1, 1]


def test_a_cell_differs_from_another_only_by_encoder_seed_mode_and_place() -> None:
    config = make_config("encoder=region")
    all_cells = cells_of(config)
    assert len({cell.folder for cell in all_cells}) == len(all_cells) == 3 * 2 * 2 * 3
    assert all_cells[0].arm == "region"  # the reference is first
    run = cell_config(config, all_cells[-1])
    assert (run.encoder, run.train.seed, run.data.seed, run.task["probe"]["seed"]) == ("t1@x", 5, 5, 5)
    assert run.run.folder == "b/cells/tube-1-full-seed5"
    assert run.task["unfreezing"]["first_layer_opens_at_step"] == 0
    probe = cell_config(config, next(cell for cell in all_cells if cell.mode == "probe"))
    assert probe.task["unfreezing"]["first_layer_opens_at_step"] == config.train.steps


def test_a_metric_within_sites_wants_a_site_with_both_classes() -> None:
    is_case, sites = np.array([True, True, False, False]), np.array(["a", "a", "b", "b"])
    (problem,) = pair_problems("within_site_auroc", is_case, sites)
    assert "metric: within_site_auroc" in problem
    assert pair_problems("auroc", is_case, sites) == []
    assert pair_problems("within_site_auroc", is_case, np.array(["a", "b", "b", "b"])) == []


def test_a_better_arm_is_called_better_and_an_equal_one_is_not(found: Comparison) -> None:
    verdicts = {(row.mode, row.arm): row.verdict for row in found.rows if row.kind == "difference"}
    assert verdicts["probe", "region"].startswith("better by")
    assert verdicts["full", "region"].startswith("better by")
    assert verdicts["full", "tube"].startswith("no difference shown")
    assert len(verdicts) == 4


def test_a_row_is_the_mean_of_its_cells_and_baselines_stand_beside(found: Comparison) -> None:
    row = next(row for row in found.rows if (row.kind, row.mode, row.arm) == ("arm", "full", "region"))
    of_cells = [value for mode, arm, _, _, value in found.cells if (mode, arm) == ("full", "region")]
    assert row.value == pytest.approx(np.mean(of_cells))
    scores = make_answer(Cell("region", 0, "g0@x", "full", 3), 2.0).scores[MODEL]
    assert of_cells[0] == pytest.approx(CLASS_METRICS[0].value(scores))
    site = next(row for row in found.rows if row.arm == "site alone")
    assert (site.mode, site.value) == ("baseline", 0.5)


def test_an_encoder_that_does_not_say_whom_it_saw_is_marked_in_its_row(found: Comparison) -> None:
    marks = {(row.mode, row.arm): row.verdict for row in found.rows if row.kind == "arm"}
    assert marks["probe", "tube"] == "NOT KNOWN whether its encoder saw test subjects"
    assert marks["probe", "random"] == ""
    assert "| probe | tube |" in as_markdown(found)


def test_arms_of_a_value_task_are_compared_from_their_score_tables_by_hand(tmp_path: Path) -> None:
    age = ["~task.label", "+task.label={column: age, unit: years}"]
    config = make_config(*age, "metric=mean_absolute_error", "seeds=[0]", encoders="[near@x,far@x]")
    error_of = {"near@x": [1, -1, 2, -2], "far@x": [5, -5, 6, -6]}  # years
    answers = {}
    for number, cell in enumerate(cells_of(config)):
        store = LocalStore(tmp_path / str(number))
        tables = {MODEL: ages(error_of[cell.arm]), "site alone": ages([10, -10, 10, -10])}
        store.put("scores.csv", scores_table(tables).encode())
        store.put("metrics.json", json.dumps({"overlap": []}).encode())
        answers[cell] = read_answer(store, config)
    found = compare(config, answers)
    rows = {(row.kind, row.mode, row.arm): row for row in found.rows}
    assert {arm: rows["arm", "full", arm].value for arm in error_of} == {"near@x": 1.5, "far@x": 5.5}
    assert rows["arm", "baseline", "site alone"].value == 10
    assert np.isnan(rows["arm", "full", "near@x"].p)  # there is no chance level of an error
    difference = rows["difference", "full", "far@x"]
    assert (difference.value, difference.low, difference.high) == (4.0, 4.0, 4.0)  # of every subject
    assert difference.verdict.startswith("no difference shown: nothing varies")
    assert "mean absolute error (lowest is best) on 4 test subjects" in as_markdown(found)
    assert draw(found).startswith(b"\x89PNG")


def test_a_lower_error_is_better() -> None:
    age = ["~task.label", "+task.label={column: age, unit: years}"]
    config = make_config(*age, "metric=mean_absolute_error", encoders="[far@x,near@x]")
    size = {"far@x": 6.0, "near@x": 1.0}

    def answer(cell: Cell) -> Answer:
        generator = np.random.default_rng([cell.seed, len(cell.arm)])
        return Answer({MODEL: ages(size[cell.arm] + generator.normal(size=40))}, 0)

    found = compare(config, {cell: answer(cell) for cell in cells_of(config)})
    rows = [row for row in found.rows if row.kind == "difference"]
    assert [row.verdict.split(" by ")[0] for row in rows] == ["better", "better"]
    assert rows[0].value == pytest.approx(1.17 - 6, abs=0.3)  # the mean of |1 + noise|, less that of |6 + noise|


def ages(errors: Sequence[float] | np.ndarray) -> Scores:
    truth = 30.0 + np.arange(len(errors))
    names = tuple(f"s{index:02d}" for index in range(len(errors)))
    return Scores(names, truth + np.asarray(errors), truth, np.full(len(errors), "a"), reference=31.5)


def test_a_metric_that_the_task_does_not_declare_is_refused() -> None:
    (problem,) = metric_problems(make_config("metric=r2"))
    assert problem.startswith("metric: r2 is none of the task's within_site_auroc, auroc, balanced_accuracy; name one")
    assert metric_problems(make_config("metric=auroc")) == []
    assert metric_of(make_config()).name == "within_site_auroc"


def test_the_figure_is_a_picture_and_the_same_bytes_every_time(found: Comparison) -> None:
    first = draw(found)
    assert first.startswith(b"\x89PNG")
    assert first == draw(found)


def test_cells_scored_on_different_subjects_are_refused() -> None:
    config = make_config()
    answers = make_answers(config, dict.fromkeys(arms_of(config), 1.0))
    last = [*answers][-1]
    scores = answers[last].scores[MODEL]
    other = Scores(("x", *scores.subjects[1:]), scores.values, scores.truth, scores.sites)
    with pytest.raises(FinetuneError, match="scored on other subjects than the first cell"):
        readings(answers | {last: Answer({MODEL: other}, 0)}, last.mode)


def test_a_finished_cell_is_not_taken_for_one_of_a_set_or_encoder_that_was_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "golden.npy").write_bytes(b"one")
    config = make_config(encoders=f"[{tmp_path},b@x]")
    run = cell_config(config, cells_of(config)[0])
    run = dataclasses.replace(run, run=dataclasses.replace(run.run, folder=str(tmp_path)))
    monkeypatch.setattr(subject_planning, "open_set", lambda location, split: SimpleNamespace(fingerprint="11"))
    made_of = {"callosum.set_fingerprint": "11", "callosum.backbone_output": file_sha256(tmp_path / "golden.npy")}
    lineage = {"config hash": config_hash(run), **made_of}
    (tmp_path / "metrics.json").write_text(json.dumps({"lineage": lineage}))
    assert is_finished(GridRun("finetune", run))
    other = dataclasses.replace(run, train=dataclasses.replace(run.train, choose="last"))
    assert not is_finished(GridRun("finetune", other))
    (tmp_path / "golden.npy").write_bytes(b"other")
    with pytest.raises(TrainingError, match=r"written anew \(callosum.backbone_output 7692c3ad3540, now d9298a10d1b0"):
        is_finished(GridRun("finetune", run))
    monkeypatch.setattr(subject_planning, "open_set", lambda location, split: SimpleNamespace(fingerprint="22"))
    with pytest.raises(TrainingError, match=r"\(callosum.set_fingerprint 11, now 22, callosum.backbone_output"):
        is_finished(GridRun("finetune", run))
