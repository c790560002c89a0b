"""The few calls into ANTs (antspyx, an optional extra), on upright volumes and RAS+ matrices.

Promise: one thread, seeded, temporary files only in a folder that is deleted afterwards. ANTs is still not
bit-reproducible, which is why its transforms are stored. Knows no scan and no template.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import nibabel
import numpy as np
from jaxtyping import Bool, Float64

from brain_models.errors import ScanError
from data_sharding.registration.volumes import Volume

INSTALL_HINT = "pip install -e '.[registration]' (antspyx==0.6.3)"

LPS_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # ITK's x and y run the other way


class RegistrationError(ScanError):
    """A raw scan that cannot be brought to the template, or not well enough."""


@dataclass(frozen=True)
class Stage:
    """One optimisation: iterations, shrink factors and smoothing (voxels) of its levels, coarse to fine."""

    kind: str  # Rigid, Similarity or Affine
    iterations: tuple[int, ...]
    shrink: tuple[int, ...]
    smoothing: tuple[int, ...]


def require_ants() -> ModuleType:
    """Returns the ants module, held to one thread; RegistrationError with the install hint where it is missing."""
    os.environ["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] = "1"  # ITK reads it when it first computes
    try:
        import ants
    except ImportError as error:
        raise RegistrationError(
            f"raw scans need registration, and antspyx is not installed ({error}); {INSTALL_HINT}, "
            "or give scans that are in the template's space already"
        ) from error
    return ants


def bias_field(image: Volume, tissue: Bool[np.ndarray, "x y z"]) -> Volume:
    """Returns the slow change of brightness over the tissue (N4; Tustison et al. 2010): divide by it."""
    ants = require_ants()
    field = ants.n4_bias_field_correction(
        _to_ants(image),
        mask=_to_ants(image.with_values(tissue)),
        shrink_factor=2,
        convergence={"iters": [50, 50, 30], "tol": 1e-4},
        return_bias_field=True,
    )
    return image.with_values(field.numpy())


def align(
    fixed: Volume,
    moving: Volume,
    stages: list[Stage],
    *,
    start: Float64[np.ndarray, "4 4"],
    compared: Bool[np.ndarray, "x y z"],
    seed: int,
) -> Float64[np.ndarray, "4 4"]:
    """Returns the matrix from mm of `fixed` to mm of `moving`, by mutual information over `compared` of `fixed`."""
    matrix = start
    for stage in stages:
        with tempfile.TemporaryDirectory() as folder:
            _write_matrix(matrix, Path(folder) / "start.mat")
            _run(
                fixed,
                moving,
                stage.kind,
                folder=folder,
                compared=compared,
                seed=seed,
                mask_all_stages=True,
                aff_iterations=stage.iterations,
                aff_shrink_factors=stage.shrink,
                aff_smoothing_sigmas=stage.smoothing,
            )
            matrix = _read_matrix(Path(folder) / "found_0GenericAffine.mat")
    return matrix


def deform(
    fixed: Volume, moving: Volume, *, start: Float64[np.ndarray, "4 4"], compared: Bool[np.ndarray, "x y z"], seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns displacements [x, y, z, 3] in mm on a grid of `fixed`, and that grid's affine (SyN; Avants et al. 2008).

    A point p of `fixed` lies at `start @ (p + displacement)` of `moving`.
    """
    with tempfile.TemporaryDirectory() as folder:
        _write_matrix(start, Path(folder) / "start.mat")
        _run(fixed, moving, "SyNOnly", folder=folder, compared=compared, seed=seed, reg_iterations=(40, 20, 10))
        warp = nibabel.load(Path(folder) / "found_1Warp.nii.gz")
        field = np.asarray(warp.dataobj, dtype=np.float32)[:, :, :, 0]  # type: ignore[attr-defined]
        return field * np.array([-1, -1, 1], dtype=np.float32), np.asarray(warp.affine, dtype=np.float64)  # type: ignore[attr-defined]


def _run(
    fixed: Volume,
    moving: Volume,
    kind: str,
    *,
    folder: str,
    compared: np.ndarray,
    seed: int,
    **options: bool | tuple[int, ...],
) -> None:
    ants = require_ants()
    ants.config.set_ants_deterministic(on=False, seed_value=seed)  # on=True would reseed numpy's global generator
    try:
        ants.registration(
            _to_ants(fixed),
            _to_ants(moving),
            kind,
            initial_transform=[f"{folder}/start.mat"],
            outprefix=f"{folder}/found_",
            mask=_to_ants(fixed.with_values(compared)),
            **options,
        )
    except RuntimeError as error:
        raise RegistrationError(f"ANTs gave up ({error})") from error


def _to_ants(image: Volume):  # type: ignore[no-untyped-def]  # noqa: ANN202  # antspyx has no types
    return require_ants().from_numpy(
        image.values,
        origin=tuple(image.origin_mm * [-1, -1, 1]),
        spacing=(image.spacing_mm,) * 3,
        direction=LPS_RAS[:3, :3],
    )


def _write_matrix(matrix: np.ndarray, path: Path) -> None:
    ants = require_ants()
    in_lps = LPS_RAS @ matrix @ LPS_RAS
    transform = ants.create_ants_transform(
        transform_type="AffineTransform", precision="double", dimension=3, matrix=in_lps[:3, :3], offset=in_lps[:3, 3]
    )
    ants.write_transform(transform, str(path))


def _read_matrix(path: Path) -> np.ndarray:
    """ITK's y = M (x - centre) + centre + translation, as one RAS+ matrix."""
    transform = require_ants().read_transform(str(path))
    parameters, centre = np.array(transform.parameters), np.array(transform.fixed_parameters)
    matrix = np.eye(4)
    matrix[:3, :3] = parameters[:9].reshape(3, 3)
    matrix[:3, 3] = parameters[9:] + centre - matrix[:3, :3] @ centre
    return LPS_RAS @ matrix @ LPS_RAS
