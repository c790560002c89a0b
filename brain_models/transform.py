"""Where the points of a template lie in one scan: estimated once by a registration, stored as plain arrays, reused.

Promise: applying a stored transform needs neither the registration software nor its files, and gives the same numbers
each time. All millimetres are RAS+ (x to the right, y to the front, z up), as in NIfTI affines. Knows no image.
"""

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float64

from brain_models.errors import ScanError

Alignment = Literal["nonlinear", "affine"]

Record = dict[str, str | float | list[float]]

FIELDS_OF_ONE_ARRAY = ("displacement_mm", "displacement_affine", "motion", "framewise_displacement_mm")


@dataclass(frozen=True, eq=False)
class Transform:
    """A point p of the template lies at `inverse(scan_to_template) @ (p + displacement_mm(p))` of the scan, when the
    head is where it was in the scan's reference; in frame t it lies at `motion[t]` of that."""

    alignment: Alignment
    template: str
    scan_to_template: Float64[np.ndarray, "4 4"]
    displacement_mm: np.ndarray | None  # float16 [x, y, z, 3] on a grid of the template
    displacement_affine: np.ndarray | None  # float64 [4, 4], index of that grid -> mm of the template
    motion: np.ndarray | None  # float64 [time, 4, 4], mm of the reference -> mm of the frame
    framewise_displacement_mm: np.ndarray | None  # float32 [time], NaN first; Power 2012
    record: Record  # of the registration: similarity, starts, versions

    def to_scan_mm(self, template_mm: Float64[np.ndarray, "point 3"]) -> Float64[np.ndarray, "point 3"]:
        """Returns where points of the template lie in the scan, head at the reference."""
        moved_mm = template_mm if self.displacement_mm is None else template_mm + self._displacements(template_mm)
        return apply_matrix(np.linalg.inv(self.scan_to_template), moved_mm)

    def _displacements(self, template_mm: np.ndarray) -> np.ndarray:
        from scipy import ndimage

        assert self.displacement_mm is not None
        assert self.displacement_affine is not None
        indices = apply_matrix(np.linalg.inv(self.displacement_affine), template_mm).T
        field = self.displacement_mm.astype(np.float32)
        axes = [ndimage.map_coordinates(field[..., axis], indices, order=1, mode="nearest") for axis in range(3)]
        return np.stack(axes, axis=1)

    def save(self, path: Path | str) -> None:
        """Writes a .npz, without pickle; equal transforms give equal bytes."""
        arrays: dict[str, np.ndarray] = {"scan_to_template": self.scan_to_template}
        arrays |= {name: getattr(self, name) for name in FIELDS_OF_ONE_ARRAY if getattr(self, name) is not None}
        texts = {"alignment": self.alignment, "template": self.template, "record": json.dumps(self.record)}
        arrays |= {name: np.array(text) for name, text in texts.items()}
        with open(path, "wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)

    @classmethod
    def load(cls, path: Path | str) -> "Transform":
        """Returns the transform saved at `path`; ScanError when the file is not one."""
        try:
            with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
                saved = {key: file[key] for key in file.files}
            return cls(
                alignment=str(saved["alignment"]),  # type: ignore[arg-type]
                template=str(saved["template"]),
                scan_to_template=saved["scan_to_template"],
                record=json.loads(str(saved["record"])),
                **{name: saved.get(name) for name in FIELDS_OF_ONE_ARRAY},
            )
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise ScanError(
                f"{path} is not a stored transform ({error}); delete it and register the scan again"
            ) from error


def apply_matrix(matrix: Float64[np.ndarray, "4 4"], points_mm: Float64[np.ndarray, "point 3"]) -> np.ndarray:
    """Returns the points moved by a 4x4 matrix, float64 [point, 3]."""
    return points_mm @ matrix[:3, :3].T + matrix[:3, 3]
