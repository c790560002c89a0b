"""The command that a command ends with is whole and right."""

import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import configs
from configs.entry import compose, load
from configs.words import aligned, counted, size_of
from data_sharding.hints import SPACES_MM, after_phantom, after_set, after_source_phantom, contents
from data_sharding.source_phantoms import datasets


def words_of(line: str) -> tuple[str, list[str]]:
    """The command and its overrides."""
    start, python, flag, part, *overrides = shlex.split(line)
    assert (start, python, flag) == ("next:", "python", "-m")
    return part, overrides


@pytest.mark.parametrize(
    ("spacing_mm", "num_subjects", "name", "num_test"),
    [(6.0, 24, "mni6", 8), (4.0, 220, "mni4", 104), (5.0, 24, "mni5", 8)],
)
def test_the_phantoms_hint_names_the_space_of_its_scans_and_splits_that_its_subjects_suffice_for(
    tmp_path: Path, spacing_mm: float, num_subjects: int, name: str, num_test: int
) -> None:
    scans = tmp_path / "bids of mine"
    scans.mkdir()
    _, phantom = load(
        "data_sharding.phantom", [f"out='{tmp_path}/new'", f"num_subjects={num_subjects}", f"spacing_mm={spacing_mm}"]
    )
    phantom.out = f"{scans}/"
    part, overrides = words_of(after_phantom(phantom))
    assert part == "data_sharding"
    _, config = load(part, overrides)
    assert (config.source.root, config.out) == (str(scans), f"{scans}-shards")
    assert (config.space.name, config.space.spacing_mm) == (name, spacing_mm)
    assert config.splits.num_test == num_test


def test_every_mni_space_is_known_to_the_hint() -> None:
    found = {path.stem for path in (Path(configs.__file__).parent / "space").glob("mni*.yaml")}
    assert found == {f"mni{spacing}" for spacing in SPACES_MM}


@pytest.mark.parametrize("layout", datasets())
def test_the_hint_of_a_data_sets_phantom_is_its_own_command_on_the_folder_that_was_written(layout: str) -> None:
    part, overrides = words_of(after_source_phantom(layout, "/mine/scans/"))
    raw = compose(part, overrides)
    assert raw["source"]["kind"] == layout
    assert raw["source"]["root"].startswith("/mine/scans")
    assert raw["out"].startswith("/mine/scans_")


def manifest(*, bold_runs: int, t1: int, spacing_mm: float | None = 2.0) -> Any:
    space = {} if spacing_mm is None else {"spacing_mm": spacing_mm}
    return SimpleNamespace(counts={"bold_runs": bold_runs, "t1": t1}, preprocessing={"space": space})


@pytest.mark.parametrize(
    ("held", "kind", "folder", "steps"),
    [
        (manifest(bold_runs=24, t1=24, spacing_mm=6), "bold", "/a/set-bold", 20),
        (manifest(bold_runs=24, t1=24), "bold", "/a/set-bold", 20000),
        (manifest(bold_runs=0, t1=5, spacing_mm=6), "t1", "/a/set-t1", 240),
    ],
)
def test_a_sets_hint_pretrains_on_what_it_holds(held: Any, kind: str, folder: str, steps: int) -> None:
    part, overrides = words_of(after_set(held, "/a/set/") or "")
    raw = compose(part, overrides)
    assert (part, raw["kind"], raw["shards"], raw["run"]["folder"]) == ("pretrain", kind, "/a/set", folder)
    assert raw["train"]["steps"] == steps


def test_a_set_of_responses_has_no_hint() -> None:
    assert after_set(manifest(bold_runs=0, t1=0, spacing_mm=None), "/a/set") is None


def test_counts_and_sizes_read_as_a_person_writes_them() -> None:
    assert [counted(number, "scan") for number in (0, 1, 3200)] == ["0 scans", "1 scan", "3,200 scans"]
    assert counted(2, "series", "series") == "2 series"
    sizes = [size_of(number) for number in (1, 812, 950_000, 999_999, 4.2e6, 137_438_953_472, 5e15)]
    assert sizes == ["1 byte", "812 bytes", "950.0 kB", "1.0 MB", "4.2 MB", "137.4 GB", "5,000.0 TB"]


def test_columns_of_a_table_are_as_wide_as_their_longest_cell() -> None:
    assert aligned([("a", "b"), ("long", "")]) == "a     b\nlong"


def test_a_finished_set_is_a_table_of_what_it_holds_without_what_it_lacks() -> None:
    counts = {"subjects": 24, "bold_runs": 24, "bold_frames": 1152, "t1": 0, "parcels": 0, "responses": 0, "refused": 1}
    held: Any = SimpleNamespace(counts=counts | {"bytes": 15_400_000}, shards=[None] * 4)
    assert contents(held).splitlines() == [
        "  subjects       24",
        "  BOLD runs      24",
        "  BOLD frames    1,152",
        "  scans refused  1",
        "  shards         4",
        "  size           15.4 MB",
    ]
