"""What a terminal and a pipe show of a training's numbers."""

import io
import itertools
import re
from types import SimpleNamespace

import pytest
from rich.console import Console

from cluster.ray.outcome import relayed
from training.watch.progress import LINE_WIDTH, MUCH_LAG, MUCH_WAITING, Progress, unusual

USUAL = {"train/data_wait_share": 0.01, "train/slowest_rank": 0.0, "train/slowest_rank_lag": 0.02}


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def shown(steps: int, *, is_terminal: bool, is_verbose: bool = False, num_steps: int = 20000) -> str:
    """What is printed of `steps` steps of half a second, the loss counting down from 100; tracked every 4, evaluated
    before the first one."""
    output, clock = io.StringIO(), Clock()
    console = Console(file=output, force_terminal=is_terminal, width=100, color_system=None, legacy_windows=False)
    progress = Progress(num_steps, start=0, every_steps=4, is_verbose=is_verbose, console=console, get_time=clock)
    progress.evaluating("validation")
    progress.evaluated({"validation/loss": 0.9, "validation/r2": 0.3121, "validation/r2/mean": 0.0})
    for done in range(1, steps + 1):
        clock.now_s += 0.5
        progress.step(done, loss=100.0 - done, learning_rate=5e-4)
        if done % 4 == 0:
            progress.interval(done, USUAL | {"train/samples_per_s": 12.5})
    progress.close()
    return output.getvalue()


def test_a_pipe_gets_a_short_line_per_interval_with_the_mean_loss_of_the_interval_and_the_last_score() -> None:
    lines = shown(8, is_terminal=False).splitlines()
    assert lines == [
        "evaluating on validation ... validation r2 0.3121",
        "step 4/20000  2 steps/s  0:00:02 elapsed  2:46:38 left  loss 97.5  lr 5.00e-04  validation r2 0.3121",
        "step 8/20000  2 steps/s  0:00:04 elapsed  2:46:36 left  loss 93.5  lr 5.00e-04  validation r2 0.3121",
    ]
    assert all(len(line) <= LINE_WIDTH for line in lines)


def test_a_terminal_shows_one_bar_that_moves_with_every_step_and_prints_no_line_per_interval() -> None:
    last = shown(6, is_terminal=True).rpartition("step 6/20000")
    assert last[1], "a step between two tracked ones moves the bar"
    bar, below = last[2].splitlines()[:2]
    assert bar.split()[-6:] == ["2", "steps/s", "0:00:03", "elapsed", "2:46:37", "left"]
    assert len(last[1] + bar.rstrip()) == 100
    assert below.rstrip().endswith("loss 95.5  lr 5.00e-04  validation r2 0.3121")
    assert "samples_per_s" not in last[0]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_every_number_is_printed_where_that_is_asked_for(is_terminal: bool) -> None:
    output = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown(4, is_terminal=is_terminal, is_verbose=True))
    printed = [line.strip() for line in output.splitlines()]
    assert {"validation/r2/mean 0", "train/samples_per_s 12.5"} <= set(printed)


def test_what_is_unusual_is_a_sentence_from_its_threshold_on() -> None:
    assert unusual(USUAL | {"train/data_wait_share": MUCH_WAITING, "train/slowest_rank_lag": MUCH_LAG}) == {}
    assert unusual(USUAL | {"train/data_wait_share": 0.34}) == {
        "waiting": "34% of the step time is spent waiting for data; raise data.num_workers"
    }
    assert unusual(USUAL | {"train/slowest_rank": 3.0, "train/slowest_rank_lag": 0.45}) == {
        "lag": "rank 3 takes 45% longer than the median rank, and all wait for it; look at its node"
    }


def test_what_stays_unusual_is_said_once_and_again_when_it_comes_back() -> None:
    output = io.StringIO()
    progress = Progress(50, start=0, every_steps=10, is_verbose=False, console=Console(file=output), get_time=Clock())
    for done, share in zip(itertools.count(10, 10), (0.5, 0.4, 0.1, 0.3), strict=False):
        progress.step(done, loss=1.0, learning_rate=1e-3)
        progress.interval(done, USUAL | {"train/data_wait_share": share})
    said = [line.partition(" is spent")[0] for line in output.getvalue().splitlines() if "waiting" in line]
    assert said == ["step 10: 50% of the step time", "step 40: 30% of the step time"]


def test_the_bar_of_rank_0_reaches_the_drivers_terminal_at_its_width(monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[str] = []
    outcome = SimpleNamespace(add_text=SimpleNamespace(remote=lambda is_error, text: texts.append(text)))
    monkeypatch.setenv("COLUMNS", "70")  # as a worker is told by its driver
    monkeypatch.setenv("TERM", "xterm")
    with relayed(outcome, is_terminal=True):
        progress = Progress(5, start=2, every_steps=10, is_verbose=False, console=Console(), get_time=Clock())
        progress.step(3, loss=0.5, learning_rate=1e-3)
        progress.say("step 3: something unusual")
        print("a line of the task")
        progress.close()
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", "".join(texts)).replace("\r", "\n").splitlines()
    assert {"step 3: something unusual", "a line of the task"} <= {line.strip() for line in lines}
    assert lines[-2].startswith("step 3/5 ")
    assert len(lines[-2]) == 70
    assert lines[-1].rstrip() == "loss 0.5  lr 1.00e-03"
