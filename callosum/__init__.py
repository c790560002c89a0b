"""The public face of Callosum: load a pretrained model, read a shard set, ask for the version.

    import callosum

    model = callosum.load("models:/callosum-bold@champion", tracking="sqlite:///out/mlflow.db")
    [embedding] = model.embed(["sub-01_task-rest_space-MNI152NLin6Asym_desc-preproc_bold.nii.gz"])
    embedding.regions            # [region, width]; embedding.region_names names the rows
    dataset = callosum.open_shards("s3://brains/adhd", kind="bold", window_frames=20)

Promise: what is named here keeps its name and meaning. Importing it imports neither torch nor MLflow.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from callosum.model import LoadedModel, load
    from data_sharding.read.open_shards import open_shards

__all__ = ["LoadedModel", "__version__", "load", "open_shards"]

__version__ = importlib.metadata.version("callosum-mri")

MODULE_OF = {"load": "callosum.model", "LoadedModel": "callosum.model", "open_shards": "data_sharding.read.open_shards"}


def __getattr__(name: str) -> Any:
    if name not in MODULE_OF:
        raise AttributeError(f"module 'callosum' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(importlib.import_module(MODULE_OF[name]), name)
