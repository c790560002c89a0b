"""A run that is asked to stop saves just in time, exits with a status of its own, and resumes when run again."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_training_checkpoints import run
from test_training_engines import losses
from training_toys import GLOBAL_BATCH, ToyBatch, ToySource, ToyTask, toy_config

from cluster.stopping import REQUEST, listening
from configs.entry import user_errors
from training.errors import StoppedError
from training.loop import Services, fit
from training.task import State


class SignallingSource(ToySource):
    """Sends this process a signal when asked for step 2."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__()
        self.number = number

    def steps(self, state: State) -> Iterator[tuple[list[ToyBatch], State]]:
        for batches, after in super().steps(state):
            if after["samples_consumed"] == 3 * GLOBAL_BATCH:
                os.kill(os.getpid(), self.number)
            yield batches, after


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_saves_at_the_end_of_the_step_and_the_rerun_equals_the_uninterrupted_run(
    tmp_path: Path, number: signal.Signals
) -> None:
    before = signal.getsignal(number)
    config = toy_config(tmp_path)
    with pytest.raises(StoppedError, match=rf"^step 3 of 6: stopped as asked by {number.name} \(rank 0\); saved as"):
        fit(ToyTask(), SignallingSource(number), config, Services(config.run, {"train": {}}, None))
    assert signal.getsignal(number) is before
    assert REQUEST.reason is None
    again = fit(ToyTask(), ToySource(), config, Services(config.run, {"train": {}}, None))
    whole = run(toy_config(tmp_path / "whole"))
    assert again.start == "own"
    assert again.metrics == whole.metrics
    assert losses(tmp_path) == losses(tmp_path / "whole")


def test_a_second_ctrl_c_ends_at_once_with_the_status_of_an_interrupt(capsys: pytest.CaptureFixture[str]) -> None:
    reasons: list[str] = []

    def interrupt_twice() -> None:
        with listening(reasons.append):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(SystemExit) as caught, user_errors():
        interrupt_twice()
    assert (reasons, caught.value.code) == (["SIGINT"], 130)
    told = capsys.readouterr().err
    assert "stopping after the step under way; Ctrl-C again ends at once\nstopped by Ctrl-C; run the same" in told


def test_a_stopped_command_exits_with_a_status_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught, user_errors():
        raise StoppedError("step 3 of 6: stopped as asked")
    assert caught.value.code == os.EX_TEMPFAIL
    assert "StoppedError: step 3 of 6" in capsys.readouterr().err
    assert sys.exc_info() == (None, None, None)
