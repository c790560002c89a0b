"""Ranks killed at random moments, uploads included: the next run resumes from a whole commit, to the same numbers."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from test_training_engines import exported, largest_difference, losses, report, run_launches

FAULT_SECTION = "Training: two ranks killed at random moments"
NUM_KILLS = 20
STEPS = 40
SLOW_S = 0.03  # of a step and of each upload: a commit takes about five steps
JOB = {"engine": "zero2", "steps": STEPS, "checkpoint_every": 6, "keep_last": 99, "opens_at": 9, "slow_s": SLOW_S}
LONGEST_S = STEPS * SLOW_S * 1.5  # some kills come after the last step, while the last commit is made
TIMEOUT_S = 3000


def kill_times(seed: int) -> tuple[int, list[float]]:
    """Who is killed first, and when each rank is, in seconds from its first step."""
    generator = np.random.default_rng(seed)
    first_s, later_s = generator.uniform(0, LONGEST_S), generator.uniform(0, 0.3)
    victim = int(generator.integers(2))  # the other rank lives on for a moment, and may still upload
    return victim, [first_s + (later_s if rank != victim else 0) for rank in (0, 1)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, list[str]]]:
    """A folder with 'whole', the uninterrupted run, and a run for each seed, killed and run again; and the commits each
    had left behind."""
    folder = tmp_path_factory.mktemp("kills")
    seeds = range(NUM_KILLS)
    killed = [[{**JOB, "folder": str(folder / str(seed)), "kill_after_s": kill_times(seed)[1]}] for seed in seeds]
    for codes in run_launches(folder, [(jobs, 2) for jobs in killed], timeout_s=TIMEOUT_S):
        assert set(codes) <= {-signal.SIGKILL, -signal.SIGABRT, 0, 1}  # 1 and SIGABRT: it saw that the other had gone
    left = {
        seed: [
            path.parent.name.rpartition("-")[0]
            for path in sorted((folder / str(seed) / "run").glob("checkpoints/*/COMMIT.json"))
        ]
        for seed in seeds
    }
    again = [{**JOB, "folder": str(folder / name)} for name in ("whole", *map(str, seeds))]
    assert run_launches(folder, [(again, 2)], timeout_s=TIMEOUT_S) == [[0, 0]]
    return folder, left


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(NUM_KILLS))
def test_a_run_killed_at_a_random_moment_resumes_to_bit_equal_losses(
    runs: tuple[Path, dict[int, list[str]]], record_property: Callable[[str, object], None], seed: int
) -> None:
    folder, left = runs
    killed, whole = folder / str(seed), folder / "whole"
    victim, after_s = kill_times(seed)
    record_property("fault", f"SIGKILL of rank {victim}, {abs(after_s[0] - after_s[1]):.2f} s later of the other")
    record_property(
        "when", f"{min(after_s):.2f} s after the first step; left {left[seed][-1] if left[seed] else 'none'}"
    )
    record_property("recovery_s", report(killed)["seconds"])
    assert report(killed)["start"] == ("own" if left[seed] else "scratch")
    assert losses(killed) == losses(whole)
    assert largest_difference(exported(killed), exported(whole)) == 0.0
    assert report(killed)["metrics"] == report(whole)["metrics"]
