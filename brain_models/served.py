"""The model MLflow serves: a table of NIfTI files (or packed arrays) in, a table of answers out.

Models-from-code: MLflow runs this file, with brain_models beside it, in a process that need not have this repository.
"""

from typing import Any

import mlflow
import numpy as np
import pandas
import torch
from mlflow.pyfunc import PythonModel

from brain_models import bundle as bundles
from brain_models.errors import ScanError
from brain_models.inputs import Row
from brain_models.models import MODELS


class ServedModel(PythonModel):
    """predict() takes a table with one row per scan and returns the answers of the model's kind.

    Columns: `bold` or `t1w` (paths of files in the model's template space), `brain_mask` (path; required when the
    model was trained on masked scans), `repetition_time_s` (needed when the header has none), `confounds` (path of
    fMRIPrep's desc-confounds_timeseries.tsv; required when the model was trained on runs cleaned by it), `transform`
    (path of a stored transform, of a scan that lies in its own space). Instead of paths, `bold` may hold packed arrays
    [time, voxel] (int8 or float16) and `t1w` float16 arrays [voxel], as shards do.
    Answers: `embedding_0` ... of an encoder, `prediction` and `probability` of a classifier, `prediction` of a
    regressor.
    """

    def load_context(self, context: Any) -> None:
        self.bundle = bundles.load(context.artifacts["bundle"])

    def predict(self, context: Any, model_input: pandas.DataFrame, params: dict[str, Any] | None = None) -> Any:
        kind = MODELS[self.bundle.kind]
        with torch.inference_mode():
            outputs = torch.cat([self._output(name, given(row)) for name, row in model_input.iterrows()])
        return pandas.DataFrame(kind.answer(self.bundle.config, outputs), index=model_input.index)

    def _output(self, name: object, row: Row) -> torch.Tensor:
        kind, bundle = MODELS[self.bundle.kind], self.bundle
        try:
            return kind.compute(bundle.model, bundle.config, kind.read(row, bundle.config, bundle.stems))
        except ScanError as error:
            raise ScanError(f"row {name}: {error}") from error


def given(row: pandas.Series) -> dict[str, Any]:
    """Returns the columns of a row that hold something."""
    return {column: value for column, value in row.items() if isinstance(value, np.ndarray) or not pandas.isna(value)}


mlflow.models.set_model(ServedModel())
