"""A T1 image and the runs registered through it: their transforms as files, or the reasons why there are none."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from brain_models.errors import ScanError
from brain_models.transform import Transform
from data_sharding.registration.config import RegistrationConfig
from data_sharding.registration.functional import register_bold
from data_sharding.registration.structural import register_t1


@dataclass
class ScanGroup:
    """A T1 image and the runs that are registered through it."""

    t1_path: str
    t1_name: str  # of its transform; its scan_id where it is in the set itself
    runs: dict[str, str]  # scan_id -> path

    @property
    def names(self) -> list[str]:
        return [self.t1_name, *self.runs]


def register_group(group: ScanGroup, config: RegistrationConfig, folder: Path) -> dict[str, str]:
    """Returns the reasons of the scans that could not be registered; the others then have <name>.npz in `folder`.

    A transform that is in the folder already is kept. Without the T1's transform no run has one.
    """
    reasons: dict[str, str] = {}
    t1_file = folder / f"{group.t1_name}.npz"
    try:
        t1_transform = Transform.load(t1_file) if t1_file.exists() else register_t1(group.t1_path, config)
    except ScanError as error:
        return dict.fromkeys(group.names, str(error))
    _save(t1_transform, t1_file)
    for name, path in group.runs.items():
        if (folder / f"{name}.npz").exists():
            continue
        try:
            transform = register_bold(path, t1=group.t1_path, t1_transform=t1_transform, config=config)
        except ScanError as error:
            reasons[name] = str(error)
        else:
            _save(transform, folder / f"{name}.npz")
    return reasons


def _save(transform: Transform, path: Path) -> None:
    """A process that is killed while it saves leaves no half of a transform."""
    unfinished = path.with_name(f"unfinished-{path.name}")
    transform.save(unfinished)
    unfinished.rename(path)
