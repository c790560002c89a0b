"""The kinds of models that a bundle can hold, as one table: what bundles, the served model and the registry read.

A new kind is a module with its functions and a row here.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor, nn

from brain_models import embedding, image_rdm, run_predictor, t1_embedder
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


def as_they_are(model: nn.Module, outputs: Tensor) -> Tensor:
    """Returns the outputs of rows that are independent of one another."""
    return outputs


@dataclass(frozen=True)
class ModelKind:
    """One kind of model. An input is whatever `read` returns; only `compute` looks into it.

    `config`: the dataclass that model.yaml holds. `build`: the module, its weights not yet loaded. `examples`: inputs
    made from a seed, for the golden output. `columns`: of the served table, for a bundle with these stems. `read`: the
    input of a row. `compute`: the output [1, output] of one input. `together`: what the outputs of all rows amount to,
    where rows are not independent. `answer`: the columns of the served answer from that.
    """

    config: type
    build: Callable[[Any, Stems], nn.Module]
    examples: Callable[[Any, Stems, int], Iterable[Any]]
    columns: Callable[[Collection[StemName]], dict[str, Column]]
    read: Callable[[Row, Any, Stems], Any]
    compute: Callable[[Any, Any, Any], Tensor]
    answer: Callable[[Any, Tensor], dict[str, np.ndarray]]
    together: Callable[[Any, Tensor], Tensor] = as_they_are
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
    "t1_embedder": ModelKind(
        config=t1_embedder.T1EmbedderConfig,
        build=t1_embedder.build,
        examples=t1_embedder.examples,
        columns=t1_embedder.columns,
        read=t1_embedder.read,
        compute=t1_embedder.compute,
        answer=t1_embedder.answer,
    ),
    "image_rdm": ModelKind(
        config=image_rdm.ImageRdmConfig,
        build=image_rdm.build,
        examples=image_rdm.examples,
        columns=image_rdm.columns,
        read=image_rdm.read,
        compute=image_rdm.compute,
        answer=image_rdm.answer,
        together=image_rdm.together,
        packages=(*PACKAGES, "pillow", "transformers"),
    ),
}
