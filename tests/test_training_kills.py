"""Ranks killed at random moments, uploads included: the next run goes on from a whole commit, to the same numbers."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from test_training_engines import exported, largest_difference, losses, report, run_jobs

FAULT_SECTION = "Training: two ranks killed at random moments"
STEPS = 40
SLOW_S = 0.03  # of a step and of each upload: a commit takes about five steps
JOB = {"engine": "zero2", "steps": STEPS, "checkpoint_every": 3, "opens_at": 9, "slow_s": SLOW_S}
LONGEST_S = STEPS * SLOW_S * 1.5  # some kills come after the last step, while the last commit is made


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    assert run_jobs(folder, [{**JOB, "folder": str(folder)}], num_ranks=2) == [0, 0]
    return folder


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(20))
def test_a_run_killed_at_a_random_moment_goes_on_to_bit_equal_losses(
    tmp_path: Path, whole: Path, record_property: Callable[[str, object], None], seed: int
) -> None:
    generator = np.random.default_rng(seed)
    first_s, later_s = generator.uniform(0, LONGEST_S), generator.uniform(0, 0.3)
    victim = int(generator.integers(2))  # the other rank lives on for a moment, and may still upload
    kill_after_s = [first_s + (later_s if rank != victim else 0) for rank in (0, 1)]
    job = {**JOB, "folder": str(tmp_path)}
    codes = run_jobs(tmp_path, [{**job, "kill_after_s": kill_after_s}], num_ranks=2)
    commits = [path.parent.name for path in sorted((tmp_path / "run").glob("checkpoints/*/COMMIT.json"))]
    begun = time.monotonic()
    assert run_jobs(tmp_path, [job], num_ranks=2) == [0, 0]
    record_property("fault", f"SIGKILL of rank {victim}, then of the other {later_s:.2f} s later")
    newest = commits[-1].rpartition("-")[0] if commits else "no commit"
    record_property("when", f"{first_s:.2f} s after the first step began; found {newest}")
    record_property("recovery_s", time.monotonic() - begun)

    assert set(codes) <= {-signal.SIGKILL, -signal.SIGABRT, 0, 1}  # 1 and SIGABRT: it noticed that the other had gone
    assert report(tmp_path)["start"] == ("own" if commits else "scratch")
    assert losses(tmp_path) == losses(whole)
    assert largest_difference(exported(tmp_path), exported(whole)) == 0.0
    assert report(tmp_path)["metrics"] == report(whole)["metrics"]
