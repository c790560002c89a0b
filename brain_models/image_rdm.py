"""The model kind "image_rdm": images in, the dissimilarity of the brain's responses to every two of them out."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from brain_models.encoder import StemName
from brain_models.image_encoders import ImageEncoder, ImageEncoderConfig
from brain_models.images import ImageError, prepared, read_image
from brain_models.inputs import Column, Row, Stems
from brain_models.pair_heads import PairHead, PairHeadConfig, make_head

NUM_EXAMPLES = 3
COLUMN = "image"


@dataclass
class ImageRdmConfig:
    """An encoder of images and a head over pairs; what was predicted in training, for whoever reads model.yaml."""

    encoder: ImageEncoderConfig
    head: PairHeadConfig
    num_features: int
    measure: str
    region: str


class ImageRdm(nn.Module):
    """An image encoder under a head over pairs."""

    def __init__(self, encoder: ImageEncoder, head: PairHead) -> None:
        super().__init__()
        self.image_encoder = encoder
        self.head = head

    def forward(self, images: UInt8[Tensor, "image y x colour"]) -> Float[Tensor, "image image"]:
        """Returns the dissimilarities of all images."""
        return self.head.matrix(self.head.embed(self.image_encoder(images)))


def build(config: ImageRdmConfig, stems: Stems) -> ImageRdm:
    """Returns a fresh encoder under a fresh head."""
    return ImageRdm(ImageEncoder(config.encoder), make_head(config.num_features, config.head))


def examples(config: ImageRdmConfig, stems: Stems, seed: int) -> Iterator[UInt8[Tensor, "1 y x colour"]]:
    """Yields images of noise."""
    spec, numbers = config.encoder.input, np.random.Generator(np.random.PCG64(seed))
    for _ in range(NUM_EXAMPLES):
        yield torch.from_numpy(numbers.integers(0, 256, (1, spec.size, spec.size, len(spec.mean)), dtype=np.uint8))


def columns(stems: Collection[StemName]) -> dict[str, Column]:
    """Returns the one column."""
    return {COLUMN: Column("images/nsd-00013.png", is_required=True)}


def read(row: Row, config: ImageRdmConfig, stems: Stems) -> UInt8[Tensor, "1 y x colour"]:
    """Returns an image file as the encoder reads it; ImageError when it is none."""
    if COLUMN not in row:
        raise ImageError(f"no {COLUMN}; give the path of an image file in that column")
    return torch.from_numpy(prepared(read_image(row[COLUMN]), config.encoder.input).copy())[None]


def compute(model: ImageRdm, config: ImageRdmConfig, image: UInt8[Tensor, "1 y x colour"]) -> Float[Tensor, "1 width"]:
    """Returns what of the image enters its pairs."""
    return model.head.embed(model.image_encoder(image))


def together(model: ImageRdm, outputs: Float[Tensor, "row width"]) -> Float[Tensor, "row row"]:
    """Returns the dissimilarities of all rows' images."""
    return model.head.matrix(outputs)


def answer(config: ImageRdmConfig, outputs: Float[Tensor, "row row"]) -> dict[str, np.ndarray]:
    """Returns the columns dissimilarity_0, dissimilarity_1 ...: a row's image to the image of row 0, 1 ..."""
    return {f"dissimilarity_{index}": column.numpy() for index, column in enumerate(outputs.T)}
