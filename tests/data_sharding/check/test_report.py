"""The report holds the numbers it was given, needs nothing else, and says when the data are a phantom."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from cluster.storage.stores import LocalStore
from finetune.compare.cells import read_answer
from finetune.report.page import MODEL, Classifier, ReportContents, render, show_interval, write
from finetune.tasks.subject_prediction.evaluation import BootstrapConfig, Scores, evaluate


@pytest.fixture(scope="module")
def contents() -> ReportContents:
    generator = np.random.default_rng(0)
    is_case = np.arange(30) % 2 == 0
    scores = Scores(
        tuple(f"s{index}" for index in range(30)),
        generator.normal(size=30) + is_case,
        is_case,
        np.repeat(["north<1>", "south", "west"], 10),
    )
    evaluation = evaluate(scores, threshold=0.5, config=BootstrapConfig(num_resamples=50, confidence=0.95, seed=0))
    return ReportContents(
        title="ADHD classification",
        is_phantom=True,
        classifiers={MODEL: Classifier(scores, evaluation, ""), "site only": Classifier(scores, evaluation, "note")},
        losses={"train": [(1, 0.7), (2, 0.6)]},
        metrics={"auroc": [(2, 0.6)]},
        marks={"encoder.3": 1},
        lineage={"set fingerprint": "abc123", "backbone": "models:/callosum-bold/1"},
        overlap=(),
        seconds={"training": 12.0},
    )


def test_page_shows_every_result_with_its_interval_and_every_lineage_entry(contents: ReportContents) -> None:
    page = render(contents)
    evaluation = contents.classifiers[MODEL].evaluation
    assert show_interval(evaluation.within_site_auroc) in page
    assert show_interval(evaluation.balanced_accuracy) in page
    assert "abc123" in page
    assert "models:/callosum-bold/1" in page
    assert page.count("<svg") == 4


def test_page_needs_no_other_file_and_escapes_names(contents: ReportContents) -> None:
    page = render(contents)
    for outside in ("src=", "<link", "<script", "@import", 'href="http'):
        assert outside not in page.split("</style>")[1].replace('xlink:href="#', ""), outside
    assert "north&lt;1&gt;" in page
    assert "<td>north<1>" not in page


def test_scores_are_read_back_by_a_comparison_also_where_a_sites_name_has_a_comma(
    contents: ReportContents, tmp_path: Path
) -> None:
    row = contents.classifiers[MODEL]
    scores = dataclasses.replace(row.scores, sites=np.repeat(["New York, NYU", 'the "old" scanner', "west"], 10))
    write(dataclasses.replace(contents, classifiers={MODEL: dataclasses.replace(row, scores=scores)}), tmp_path)
    found = read_answer(LocalStore(str(tmp_path))).scores[MODEL]
    assert found.sites.tolist() == scores.sites.tolist()
    assert found.is_case.tolist() == scores.is_case.tolist()
    np.testing.assert_allclose(found.values, scores.values - 0.5, atol=1e-6)


def test_page_is_the_same_text_every_time(contents: ReportContents) -> None:
    assert render(contents) == render(contents)


def test_page_says_phantom_only_when_it_is_one(contents: ReportContents) -> None:
    assert "Phantom data" in render(contents)
    assert "Phantom data" not in render(dataclasses.replace(contents, is_phantom=False))


def test_page_raises_the_alarm_when_the_backbone_saw_test_subjects(contents: ReportContents) -> None:
    assert "None of the 30 test subjects was seen" in render(contents)
    assert "pretrained on 2 of the 30 test" in render(dataclasses.replace(contents, overlap=("s1", "s2")))
    assert "cannot be excluded" in render(dataclasses.replace(contents, overlap=None))


def test_written_numbers_can_be_read_back_and_undefined_ones_are_null(contents: ReportContents, tmp_path: Path) -> None:
    row = contents.classifiers[MODEL]
    one_class = dataclasses.replace(row.scores, is_case=np.zeros(30, dtype=bool))
    config = BootstrapConfig(num_resamples=10, confidence=0.95, seed=0)
    undefined = Classifier(one_class, evaluate(one_class, threshold=0.0, config=config), "")
    page = write(dataclasses.replace(contents, classifiers={MODEL: row, "undefined": undefined}), tmp_path)
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    numbers = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert numbers["classifiers"][MODEL]["auroc"]["value"] == row.evaluation.auroc.value
    assert numbers["classifiers"]["undefined"]["auroc"]["value"] is None
    table = (tmp_path / "scores.csv").read_text(encoding="utf-8").splitlines()
    assert len(table) == 61
    assert table[1].startswith(f"{MODEL},s0,north<1>,1,")
