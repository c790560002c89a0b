"""The model MLflow serves: NIfTI files (or packed arrays) in, embeddings or predictions out.

Models-from-code: MLflow runs this file, with brain_models beside it, in a process that need not have this repository.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas
import torch
from mlflow.pyfunc import PythonModel

from brain_models import bundle as bundles
from brain_models.cleaning import clean_bold
from brain_models.encoder import StemName, TokenKind, kind_of
from brain_models.errors import ScanError
from brain_models.preprocess import (
    StandardisedRun,
    dequantise,
    measured,
    pack_bold,
    pack_t1,
    standardise_bold,
    standardise_t1,
)
from brain_models.transform import Transform

COLUMNS: dict[TokenKind, str] = {"bold": "bold", "t1": "t1w"}


class ServedModel(PythonModel):
    """predict() takes a table with a row a scan.

    Columns: `bold` or `t1w` (paths of NIfTI files in the model's template space), `brain_mask` (path; required when the
    model was trained on masked scans), `repetition_time_s` (needed when the header has none), `confounds` (path of
    fMRIPrep's desc-confounds_timeseries.tsv; required when the model was trained on runs cleaned by it), `transform`
    (path of a stored transform, of a scan that lies in its own space). Instead of paths, `bold` may hold packed arrays
    [time, voxel] (int8 or float16) and `t1w` float16 arrays [voxel], as shards do.
    Returns a table: `prediction` and `probability`, or `embedding_0` ... of an encoder.
    """

    def load_context(self, context: Any) -> None:
        self.bundle = bundles.load(context.artifacts["bundle"])

    def predict(self, context: Any, model_input: pandas.DataFrame, params: dict[str, Any] | None = None) -> Any:
        rows = [row for _, row in model_input.iterrows()]
        with torch.inference_mode():
            if self.bundle.classifier is None:
                embeddings = np.stack([self._embedding(row) for row in rows])
                columns = [f"embedding_{index}" for index in range(embeddings.shape[1])]
                return pandas.DataFrame(embeddings, columns=columns, index=model_input.index)
            probabilities = np.array([self._probability(row) for row in rows])
        head = self.bundle.head
        assert head is not None
        predictions = np.where(probabilities >= head.threshold, head.positive, head.negative)
        return pandas.DataFrame({"prediction": predictions, "probability": probabilities}, index=model_input.index)

    def _embedding(self, row: pandas.Series) -> np.ndarray:
        name, values, is_measured, repetition_time_s = self._scan(row)
        window_frames = self.bundle.stems[name].window_frames
        _require_frames(row, values, window_frames)
        embedding = self.bundle.encoder.embed(
            values, is_measured, repetition_time_s, name=name, window_frames=window_frames
        )
        return embedding[0].numpy()

    def _probability(self, row: pandas.Series) -> float:
        _, values, is_measured, repetition_time_s = self._scan(row)
        classifier, head = self.bundle.classifier, self.bundle.head
        assert classifier is not None
        assert head is not None
        _require_frames(row, values, head.segment_frames)
        logits = [
            classifier(segment, is_measured, repetition_time_s) for segment in _segments(values, head.segment_frames)
        ]
        return float(torch.sigmoid(torch.stack(logits).mean()))

    def _scan(self, row: pandas.Series) -> tuple[StemName, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns stem, values [1, time, voxel], is_measured [1, voxel] and repetition time [1] of a row."""
        for kind, column in COLUMNS.items():
            if kind in self.bundle.stems and _given(row, column):
                read = self._read_bold if kind == "bold" else self._read_t1
                values, is_measured, seconds = read(row)
                return (
                    self._stem_for(row, kind, values.shape[1]),
                    torch.from_numpy(values)[None],
                    torch.from_numpy(is_measured)[None],
                    torch.tensor([seconds], dtype=torch.float32),
                )
        wanted = " or ".join(column for kind, column in COLUMNS.items() if kind in self.bundle.stems)
        raise ScanError(f"row {row.name}: columns {list(row.index)}; this model needs a column {wanted}")

    def _stem_for(self, row: pandas.Series, kind: TokenKind, num_voxels: int) -> StemName:
        """Returns the stem that reads this many voxels: files are packed into the kind's first space, arrays come as
        they are."""
        sizes = {name: space.num_voxels for name, space in self.bundle.spaces.items() if kind_of(name) == kind}
        found = [name for name, size in sizes.items() if size == num_voxels]
        if not found:
            raise ScanError(f"row {row.name}: {num_voxels} voxels in {COLUMNS[kind]}; this model reads {sizes}")
        return kind if kind in found else found[0]

    def _read_bold(self, row: pandas.Series) -> tuple[np.ndarray, np.ndarray, float]:
        seconds = float(row["repetition_time_s"]) if _given(row, "repetition_time_s") else None
        if isinstance(row["bold"], np.ndarray):
            quantised = row["bold"]
        else:
            stored, seconds = self._preprocessed(row, seconds)
            quantised = stored.quantised
        return dequantise(quantised), measured(quantised), _known(row, seconds)

    def _preprocessed(self, row: pandas.Series, seconds: float | None) -> tuple[StandardisedRun, float]:
        """Returns the run as shards would hold it, and its repetition time."""
        recipe = self.bundle.stems["bold"].preprocessing
        packed = pack_bold(
            row["bold"],
            self.bundle.spaces["bold"],
            brain_mask=self._brain_mask(row, "bold"),
            transform=_transform(row),
            unknown_orientation="refuse" if recipe is None else recipe.unknown_orientation,
        )
        seconds = _known(row, seconds or packed.header.repetition_time_s)
        if recipe is None:
            return standardise_bold(packed), seconds
        confounds = row["confounds"] if _given(row, "confounds") else None
        if confounds is None and recipe.needs_confounds:
            raise ScanError(
                f"row {row.name}: this model saw runs cleaned by their confound tables "
                f"({', '.join(recipe.cleaning.confounds) or 'first frames dropped'}); add a column confounds with "
                "the path of fMRIPrep's desc-confounds_timeseries.tsv"
            )
        run = clean_bold(packed, recipe.cleaning, repetition_time_s=seconds, confounds=confounds)
        return standardise_bold(run.packed, stored_as=recipe.stored_as), seconds

    def _read_t1(self, row: pandas.Series) -> tuple[np.ndarray, np.ndarray, float]:
        if isinstance(row["t1w"], np.ndarray):
            stored = row["t1w"]
        else:
            packed = pack_t1(
                row["t1w"], self.bundle.spaces["t1"], brain_mask=self._brain_mask(row, "t1"), transform=_transform(row)
            )
            stored = standardise_t1(packed).values
        return np.nan_to_num(stored.astype(np.float32))[None], np.isfinite(stored), 0.0

    def _brain_mask(self, row: pandas.Series, kind: TokenKind) -> Path | None:
        if _given(row, "brain_mask"):
            return Path(row["brain_mask"])
        if self.bundle.stems[kind].needs_brain_mask:
            raise ScanError(f"row {row.name}: this model saw scans through brain masks; add a column brain_mask")
        return None


def _given(row: pandas.Series, column: str) -> bool:
    return column in row.index and (isinstance(row[column], np.ndarray) or not pandas.isna(row[column]))


def _known(row: pandas.Series, seconds: float | None) -> float:
    if seconds is None:
        raise ScanError(f"row {row.name}: no repetition time in the header; add a column repetition_time_s")
    return seconds


def _transform(row: pandas.Series) -> Transform | None:
    return Transform.load(row["transform"]) if _given(row, "transform") else None


def _require_frames(row: pandas.Series, values: torch.Tensor, num_frames: int) -> None:
    if values.shape[1] < num_frames:
        raise ScanError(f"row {row.name}: {values.shape[1]} frames; this model needs at least {num_frames}")


def _segments(values: torch.Tensor, num_frames: int) -> Iterator[torch.Tensor]:
    for first in range(0, values.shape[1] - num_frames + 1, num_frames):
        yield values[:, first : first + num_frames]


mlflow.models.set_model(ServedModel())
