"""A grid of runs: each is done once, a failure stops no other, and nothing finished is taken for another run's."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from grid_toy import grid_run

from configs.entry import combinations
from configs.parse import ConfigError
from training import grid
from training.errors import StoppedError, TrainingError
from training.grid import GridConfig, GridRun, is_finished, plan, run_all, validate


def attempts(one: GridRun) -> int:
    file = Path(one.folder) / "attempts"
    return len(file.read_text()) if file.exists() else 0


def test_a_failing_run_stops_no_other_and_is_named_and_then_only_it_runs_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [grid_run(tmp_path, value) for value in (3, -1, 5)]
    for num_attempts in (1, 2):
        with pytest.raises(TrainingError) as caught:
            run_all(runs)
        assert [attempts(one) for one in runs] == [1, num_attempts, 1]
    assert str(caught.value) == (
        "1 of 3 runs failed, the others are finished; run the same command again:\n"
        f"  - {tmp_path}/-1/failure.txt: ValueError: -1 is negative"
    )
    assert "Traceback" in (tmp_path / "-1/failure.txt").read_text()
    assert "3 runs, 2 finished" in capsys.readouterr().out


def test_a_run_that_succeeds_after_all_leaves_no_failure(tmp_path: Path) -> None:
    one = grid_run(tmp_path, 1)
    (tmp_path / "1").mkdir()
    (tmp_path / "1/failure.txt").touch()
    run_all([one])
    assert is_finished(one)
    assert not (tmp_path / "1/failure.txt").exists()


def test_a_folder_of_another_configuration_is_refused_before_anything_runs(tmp_path: Path) -> None:
    run_all([grid_run(tmp_path, 1, name="first")])
    other = grid_run(tmp_path, 2, name="new")
    with pytest.raises(TrainingError, match=r"first/run\.json belongs to another(.|\n)*value: 1 there, 7 here"):
        run_all([other, grid_run(tmp_path, 7, name="first")])
    assert attempts(other) == 0


def test_a_result_of_inputs_that_were_written_anew_is_refused(tmp_path: Path) -> None:
    (tmp_path / "inputs").write_text("one")
    run_all([grid_run(tmp_path, 1)])
    (tmp_path / "inputs").write_text("other")
    with pytest.raises(TrainingError, match=r"1: was made before .*/inputs was written anew \(inputs one, now other\)"):
        run_all([grid_run(tmp_path, 1)])


def test_a_command_without_results_makes_no_grid() -> None:
    with pytest.raises(TrainingError, match=r"training\.runs has no results of its own; run it without a grid"):
        run_all([GridRun("training.runs", None)])


def test_a_run_that_was_asked_to_stop_stops_the_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(part: str) -> None:
        raise StoppedError("step 3: stopped as asked")

    runs = [grid_run(tmp_path, 1)]
    assert not is_finished(runs[0])
    monkeypatch.setattr(grid, "command_named", stop)
    with pytest.raises(StoppedError, match="step 3"):
        run_all(runs)


def test_values_with_commas_are_combined_and_lists_are_values() -> None:
    assert combinations(["a=1,2", "b=[5,6]", "c=x,y", "d='${a}'"]) == [
        ["a=1", "b=[5,6]", "c=x", "d='${a}'"],
        ["a=1", "b=[5,6]", "c=y", "d='${a}'"],
        ["a=2", "b=[5,6]", "c=x", "d='${a}'"],
        ["a=2", "b=[5,6]", "c=y", "d='${a}'"],
    ]
    with pytest.raises(ConfigError, match="a=b c=,d cannot be read as key=value"):
        combinations(["a=b c=,d"])


def test_the_plan_counts_runs_and_finished_ones_and_runs_of_one_folder_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(part: str, overrides: list[str]) -> tuple[None, object]:
        value = int(overrides[0].removeprefix("value="))
        return None, grid_run(tmp_path, value, name=overrides[1].removeprefix("folder=")).config

    monkeypatch.setattr(grid, "load", load)
    run_all([grid_run(tmp_path, 2, name="b")])
    config = GridConfig("grid_toy", ("value=2", "folder=a,b"))
    assert validate(config) == []
    assert plan(config) == f"runs   2, 1 finished\neach, as {tmp_path}/b:\nvalue 2"
    (problem,) = validate(dataclasses.replace(config, overrides=("value=2,3", "folder=c")))
    assert problem.startswith(f"run.folder: several runs have {tmp_path}/c; give each its own")
