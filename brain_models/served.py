"""The model MLflow serves: a table of NIfTI files (or packed arrays) in, a table of answers out.

Models-from-code: MLflow runs this file, with brain_models beside it, in a process that need not have this repository.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlflow
import pandas
import torch
from mlflow.pyfunc import PythonModel

from brain_models import bids
from brain_models import bundle as bundles
from brain_models.errors import UserError
from brain_models.inputs import COLUMN_OF_KIND, Row
from brain_models.models import MODELS


class ServedModel(PythonModel):
    """predict() takes a table with one row per scan and returns the answers of the model's kind.

    Columns: `bold` or `t1w` (paths of files in the model's template space), `brain_mask` (path; required when the
    model was trained on masked scans), `repetition_time_s` (needed when the header has none), `confounds` (path of
    fMRIPrep's desc-confounds_timeseries.tsv; required when the model was trained on runs cleaned by it), `transform`
    (path of a stored transform, of a scan that lies in its own space). Instead of paths, `bold` may hold packed arrays
    [time, voxel] (int8 or float16) and `t1w` float16 arrays [voxel], as shards do; or the same as lists, as a request
    to a server brings them (dataframe_records, dataframe_split).
    Answers: `subject` and `session` from the name of the file (None where it has none), then `embedding_0` ... of an
    encoder, `prediction` and `probability_of_<class>` of a classifier, `prediction` of a regressor. A model of
    dissimilarities reads `image` (path) and answers with `dissimilarity_0` ...: to the images of row 0, 1 ...
    """

    def load_context(self, context: Any) -> None:
        self.bundle = bundles.load(context.artifacts["bundle"])

    def predict(self, context: Any, model_input: pandas.DataFrame, params: dict[str, Any] | None = None) -> Any:
        rows = [(name, given(row)) for name, row in model_input.iterrows()]
        with torch.inference_mode():
            outputs = torch.cat([self._output(name, row) for name, row in rows])
            outputs = MODELS[self.bundle.kind].together(self.bundle.model, outputs)
        named = pandas.DataFrame([entities(row) for _, row in rows], index=model_input.index, dtype=object)
        return named.assign(**MODELS[self.bundle.kind].answer(self.bundle.config, outputs))

    def _output(self, name: object, row: Row) -> torch.Tensor:
        kind, bundle = MODELS[self.bundle.kind], self.bundle
        try:
            return kind.compute(bundle.model, bundle.config, kind.read(row, bundle.config, bundle.stems))
        except UserError as error:
            raise type(error)(f"row {name}: {error}") from error


def given(row: pandas.Series) -> dict[str, Any]:
    """Returns the columns of a row that hold something."""
    is_missing = {column: pandas.api.types.is_scalar(value) and pandas.isna(value) for column, value in row.items()}
    return {column: value for column, value in row.items() if not is_missing[column]}


def entities(row: Row) -> Mapping[str, str | None]:
    """Returns `subject` and `session` of a row's scan, None where its file name does not say or it is no file."""
    path = next((row[column] for column in COLUMN_OF_KIND.values() if isinstance(row.get(column), str)), "")
    found = bids.entities_of(Path(path))
    return {"subject": found.get("sub"), "session": found.get("ses")}


mlflow.models.set_model(ServedModel())
