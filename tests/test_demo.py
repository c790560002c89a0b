"""The demo as a user runs it, held to what it promises. Minutes long: make test-demo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.browser import browser, needs_chromium

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "out"
    environment = os.environ | {"OUT": str(out), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment.pop("OMP_NUM_THREADS", None)
    subprocess.run(["bash", "examples/demo.sh"], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, check=True)
    return out


@pytest.fixture(scope="module")
def summary(out: Path) -> dict:
    return json.loads((out / "summary.json").read_text())


@pytest.mark.demo
@pytest.mark.parametrize("kind", ["bold", "t1"])
def test_hidden_voxels_of_held_out_subjects_are_guessed_better_than_by_mean_and_neighbours(
    summary: dict, kind: str
) -> None:
    found = summary["reconstruction"][kind]
    assert found["r2"] > found["mean"]
    assert found["r2"] > found["neighbour"]
    assert found["r2"] >= 0.4 * found["ridge"]


@pytest.mark.demo
def test_the_classical_baseline_finds_the_effect_and_the_model_is_scored_on_100_held_out_subjects(
    summary: dict,
) -> None:
    adhd = summary["adhd"]
    assert adhd["num_subjects"] >= 100
    assert 0.75 < adhd["connectivity"] < 0.95
    assert adhd["low"] < adhd["auroc"] < adhd["high"]
    assert adhd["low"] > 0.5


@needs_chromium
@pytest.mark.demo
def test_the_three_reports_fit_a_telephone_and_a_desk_and_the_browser_has_no_complaint(out: Path) -> None:
    subprocess.run([sys.executable, "-m", "data_sharding.report", str(out / "shards")], cwd=ROOT, check=True)
    with browser() as chromium:
        for part in ("shards", "pretrain-bold", "adhd"):
            for width in (390, 1280):
                seen = chromium.look(out / part / "report.html", width)
                assert (part, seen.complaints, seen.window_width, seen.content_width) == (part, [], width, width)
