"""A run goes on on another number of ranks under every ZeRO stage, and ends where the uninterrupted one ends."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from test_training_engines import ZERO, exported, largest_difference, losses, report, run_jobs

FAULT_SECTION = "Training: all ranks killed, another number goes on"
STEPS = 60
KILLED_AT = 31  # the last commit is of step 30: between a group's opening and the end
TIMEOUT_S = 900
JOB = {"steps": STEPS, "checkpoint_every": 6, "keep_last": 99, "opens_at": 9}


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Final validation losses of three seeds on one rank."""
    folder = tmp_path_factory.mktemp("seeds")
    jobs = [{**JOB, "engine": "plain", "folder": str(folder / str(seed)), "seed": seed} for seed in (7, 8, 9)]
    assert run_jobs(folder, jobs, num_ranks=1, timeout_s=TIMEOUT_S) == [0]
    return [report(folder / str(seed))["metrics"]["validation/loss"] for seed in (7, 8, 9)]


@pytest.mark.faults
@pytest.mark.parametrize(("num_before", "num_after"), [(2, 1), (1, 2), (3, 2)])
@pytest.mark.parametrize("engine", ZERO)
def test_a_killed_run_goes_on_on_other_ranks_within_1e_5_and_ends_inside_the_range_of_three_seeds(
    tmp_path: Path,
    seeds: list[float],
    record_property: Callable[[str, object], None],
    engine: str,
    num_before: int,
    num_after: int,
) -> None:
    whole = {**JOB, "engine": engine, "folder": str(tmp_path / "whole")}
    killed = {**JOB, "engine": engine, "folder": str(tmp_path / "killed")}
    codes = run_jobs(tmp_path, [whole, {**killed, "kill_at": KILLED_AT}], num_ranks=num_before, timeout_s=TIMEOUT_S)
    assert codes == [9] * num_before
    begun = time.monotonic()
    assert run_jobs(tmp_path, [killed], num_ranks=num_after, timeout_s=TIMEOUT_S) == [0] * num_after
    record_property("fault", f"{engine}: {num_before} ranks killed, {num_after} go on")
    record_property("when", f"step {KILLED_AT} of {STEPS}")
    record_property("recovery_s", time.monotonic() - begun)

    found, expected = losses(tmp_path / "killed"), losses(tmp_path / "whole")
    assert report(tmp_path / "killed")["start"] == "own"
    assert found == pytest.approx(expected, abs=1e-5)
    assert largest_difference(exported(tmp_path / "killed"), exported(tmp_path / "whole")) < 1e-4
    assert min(seeds) <= report(tmp_path / "killed")["metrics"]["validation/loss"] <= max(seeds)
