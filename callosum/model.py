"""A trained model as a torch module that embeds scans. Reads bundles and the registry; trains nothing."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from brain_models import bundle
from brain_models.bundle import Bundle
from brain_models.embedding import ScanEmbedding
from brain_models.inputs import COLUMN_OF_KIND
from finetune.predict import find_scans, scan_rows
from training.registry import models as registry


class LoadedModel(nn.Module):
    """What `load` returns: the model's weights as a module, on the CPU in eval mode, and `embed`.

    `bundle` also holds what the model reads: spaces, patch layouts, atlases and preprocessing.
    """

    def __init__(self, of: Bundle) -> None:
        super().__init__()
        self.bundle = of
        self.model = of.model
        self.eval()

    def forward(self, *inputs: Any, **options: Any) -> Any:
        return self.model(*inputs, **options)

    def embed(self, paths: Sequence[str | Path]) -> list[ScanEmbedding]:
        """One embedding for each scan of these files, folders and patterns, in the order of the sorted paths: `tokens`
        [window, token, width], `regions` [region, width] with `region_names`, and `scan` [width].

        Each scan's repetition time, confounds and brain mask are found by the rules of BIDS. UserError when nothing
        matches, or a scan cannot be read as the model needs it.
        """
        stems = self.bundle.stems
        rows = scan_rows(
            find_scans([str(path) for path in paths]),
            [column for kind, column in COLUMN_OF_KIND.items() if kind in stems],
            brain_masks=any(stem.needs_brain_mask for stem in stems.values()),
        )
        given = [{column: value for column, value in row.items() if value is not None} for row in rows]
        return [self.bundle.embed(row) for row in given]


def load(model: str | Path, *, tracking: str | None = None) -> LoadedModel:
    """The model of a bundle folder, or of the registry: "models:/name@alias", "models:/name/version".

    `tracking` is the address of the MLflow server; None asks MLflow, which knows MLFLOW_TRACKING_URI. UserError when
    there is no such model, or when it does not compute what it computed when it was saved.
    """
    if not str(model).startswith("models:/"):
        return LoadedModel(bundle.load(model))
    if tracking is None:
        import mlflow

        tracking = mlflow.get_tracking_uri()
    with tempfile.TemporaryDirectory(prefix="callosum-") as folder:
        return LoadedModel(bundle.load(registry.pull(str(model), Path(folder) / "model", uri=tracking)))
