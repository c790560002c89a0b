"""The kinds of models that a bundle can hold, as one table: what bundles, the served model and the registry read.

A new kind is a module with its functions and a row here.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor, nn

from brain_models import embedding, run_predictor
from brain_models.encoder import EncoderConfig, StemName
from brain_models.inputs import Column, Row, Stems, columns_of
from brain_models.run_predictor import RunClassifierConfig, RunRegressorConfig

# What brain_models imports to load a bundle and predict.
PACKAGES = (
    "mlflow",
    "torch",
    "numpy",
    "scipy",
    "pandas",
    "nibabel",
    "isal",
    "safetensors",
    "einops",
    "jaxtyping",
    "pyyaml",
)


@dataclass(frozen=True)
class ModelKind:
    """One kind of model. An input is whatever `read` returns; only `compute` looks into it.

    `config`: the dataclass that model.yaml holds. `build`: the module, its weights not yet loaded. `examples`: inputs
    made from a seed, for the golden output. `columns`: of the served table, for a bundle with these stems. `read`: the
    input of a row. `compute`: the output [1, output] of one input. `answer`: the columns of the served answer from the
    outputs of all rows, which need not be independent.
    """

    config: type
    build: Callable[[Any, Stems], nn.Module]
    examples: Callable[[Any, Stems, int], Iterable[Any]]
    columns: Callable[[Collection[StemName]], dict[str, Column]]
    read: Callable[[Row, Any, Stems], Any]
    compute: Callable[[Any, Any, Any], Tensor]
    answer: Callable[[Any, Tensor], dict[str, np.ndarray]]
    packages: tuple[str, ...] = PACKAGES


run_kind = partial(
    ModelKind,
    build=run_predictor.build,
    examples=run_predictor.examples,
    columns=run_predictor.columns,
    read=run_predictor.read,
    compute=run_predictor.compute,
)

MODELS: dict[str, ModelKind] = {
    "encoder": ModelKind(
        config=EncoderConfig,
        build=embedding.make_encoder,
        examples=embedding.examples,
        columns=columns_of,
        read=embedding.read,
        compute=embedding.compute,
        answer=embedding.answer,
    ),
    "run_classifier": run_kind(config=RunClassifierConfig, answer=run_predictor.answer_class),
    "run_regressor": run_kind(config=RunRegressorConfig, answer=run_predictor.answer_value),
}
