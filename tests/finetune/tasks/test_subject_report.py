"""The report of predictions for subjects holds the numbers, needs no other file, and its scores can be read back."""

from __future__ import annotations

import numpy as np
import pytest

from finetune.tasks.subject_prediction.labels import ClassLabel, Labels, ValueLabel
from finetune.tasks.subject_prediction.outcomes import ClassOutcome, ValueOutcome
from finetune.tasks.subject_prediction.scores import Scores, intervals, read_scores, scores_table
from finetune.tasks.subject_prediction.study import MODEL
from reports.methods import methods
from reports.page import Origin, Page, render
from training.registry.card import About
from training.statistics import BootstrapConfig
from training.study import Conclusion, Model, model_numbers, results_section, seen_notice, without_nan

BOOTSTRAP = BootstrapConfig(num_resamples=50, confidence=0.95, seed=0)
NAMES = tuple(f"s{index}" for index in range(30))
LABELS = Labels(dict.fromkeys(NAMES, True), dict.fromkeys(NAMES, "a"), 0)
CLASSES = ClassOutcome(ClassLabel("diagnosis", ["ADHD"], ["control"]), LABELS, NAMES, is_balanced=False)


@pytest.fixture(scope="module")
def scores() -> Scores:
    is_case = np.arange(30) % 2 == 0
    values = np.random.default_rng(0).normal(size=30) + is_case
    return Scores(NAMES, values, is_case, np.repeat(["north<1>", "south", "west"], 10), reference=0.5)


def conclusion(scores: Scores) -> Conclusion:
    models = {
        name: Model(intervals(scores, CLASSES.metrics, BOOTSTRAP), CLASSES.details(scores), note)
        for name, note in ((MODEL, ""), ("site alone", "a note"))
    }
    sections = CLASSES.sections({MODEL: scores, "site alone": scores}, models[MODEL].details)
    titles = {metric.name: metric.title for metric in CLASSES.metrics}
    about = About("A classifier.", "", "", ())
    return Conclusion("No difference shown.", titles, models, scores.subjects, about, sections=sections)


def page(scores: Scores) -> str:
    found = conclusion(scores)
    sections = [results_section(found), *found.sections]
    origin = Origin("2026-11-22 00:10 UTC", "python -m finetune seed=<1>", "0123456789ab")
    written = methods(["Trained [@adamw]."])
    return render(Page("ADHD", found.verdict, [], sections, {"backbone": "models:/callosum-bold/1"}, origin, written))


def test_page_shows_the_verdict_first_every_result_with_its_interval_and_every_lineage_entry(scores: Scores) -> None:
    text = page(scores)
    assert text.index("No difference shown.") < text.index('<table class="data')
    for interval in conclusion(scores).models[MODEL].intervals.values():
        assert f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]" in text
    assert "models:/callosum-bold/1" in text
    assert text.count("<svg") == 2


def test_page_says_when_and_how_it_was_made_and_has_methods_with_references(scores: Scores) -> None:
    text = page(scores)
    for said in ("2026-11-22 00:10 UTC", "python -m finetune seed=&lt;1&gt;", "0123456789ab"):
        assert text.count(said) == 1
    assert "<p>Trained (Loshchilov and Hutter, 2019).</p>" in text
    assert text.index("References") < text.index("Decoupled weight decay") < text.index("Data and lineage")


def test_page_needs_no_other_file_escapes_names_and_is_the_same_every_time(scores: Scores) -> None:
    text = page(scores)
    for outside in ("src=", "<link", "<script", "@import", 'href="http'):
        assert outside not in text.split("</style>")[1].replace('xlink:href="#', ""), outside
    assert "<td>north&lt;1&gt;</td>" in text
    assert "<td>north<1>" not in text
    assert text == page(scores)


def test_scores_are_read_back_as_they_were_also_where_a_sites_name_has_a_comma(scores: Scores) -> None:
    sites = np.repeat(["New York, NYU", 'the "old" scanner', "west"], 10)
    with_commas = Scores(NAMES, scores.values, scores.truth, sites, reference=0.5)
    text = scores_table({MODEL: with_commas, "site alone": scores})
    assert len(text.splitlines()) == 61
    read = read_scores(text)
    assert list(read) == [MODEL, "site alone"]
    found = read[MODEL]
    assert (found.subjects, found.sites.tolist(), found.reference) == (NAMES, sites.tolist(), 0.5)
    assert found.truth.tolist() == scores.truth.tolist()
    np.testing.assert_allclose(found.values, scores.values, atol=1e-6)
    for metric in CLASSES.metrics:
        assert metric.value(found) == metric.value(with_commas)


def test_an_overlap_with_pretraining_is_an_alarm_and_ignorance_of_it_a_warning() -> None:
    assert seen_notice([], num_tested=30).text == "None of the 30 held-out subjects was seen in pretraining."
    alarm = seen_notice(["s1", "s2"], num_tested=30)
    assert (alarm.kind, "have seen 2 of the 30 held-out subjects (s1, s2)" in alarm.text) == ("alarm", True)
    assert seen_notice(None, num_tested=30).kind == "warning"


def test_undefined_numbers_are_null_in_json(scores: Scores) -> None:
    one_class = Scores(NAMES, scores.values, np.zeros(30, dtype=bool), scores.sites)
    numbers = without_nan(model_numbers(Model(intervals(one_class, CLASSES.metrics, BOOTSTRAP))))
    assert numbers["auroc"] == {"value": None, "low": None, "high": None}


def test_a_value_is_reported_in_its_unit_about_the_training_mean() -> None:
    labels = Labels({"a": 20.0, "b": 40.0, "c": 90.0}, dict.fromkeys("abc", "x"), 0)
    outcome = ValueOutcome(ValueLabel("age", "years"), labels, ["a", "b"])
    assert outcome.predicted(np.array([-1.0, 0.0, 2.0])).tolist() == [20.0, 30.0, 50.0]
    found = Scores(("c",), np.array([50.0]), np.array([90.0]), np.array(["x"]))
    scored = outcome.with_reference("half", {"test": found})["test"]
    assert outcome.details(scored)["training_mean"] == 30.0
    title = outcome.sections({MODEL: scored}, outcome.details(scored))[1].table[0]
    assert title == ["site", "subjects", "mean absolute error (years)"]
