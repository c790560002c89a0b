"""Images as an encoder reads them: decoded, resized, cropped. Values stay uint8; encoders scale them.

Promise: an image file is read the same way for features, in training, and by the served model.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from brain_models.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")


class ImageError(UserError):
    """An image that cannot be read."""


@dataclass
class ImageInput:
    """The square that an encoder reads. `shortest_side` null: the whole image is squeezed into it; else the image is
    resized to that shortest side and its centre cut out."""

    size: int  # pixels
    shortest_side: int | None
    is_grayscale: bool
    mean: list[float]  # of values in 0..1, one for every colour
    std: list[float]
    uses_min_max: bool  # each image is first stretched to 0..1


def read_image(path: Path | str) -> UInt8[np.ndarray, "y x rgb"]:
    """Returns the image's colours; ImageError when the file is none."""
    try:
        with Image.open(path) as image:
            return np.array(image.convert("RGB"))
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError) as error:
        raise ImageError(f"{path}: cannot be decoded ({error}); replace it, or take it out of the table") from error


def prepared(image: UInt8[np.ndarray, "y x rgb"], spec: ImageInput) -> UInt8[np.ndarray, "side side colour"]:
    """Returns the square of the image that the encoder reads, one colour when it sees gray."""
    picture = Image.fromarray(image)
    if spec.is_grayscale:
        picture = picture.convert("L")
    if spec.shortest_side is None:
        picture = picture.resize((spec.size, spec.size), Image.Resampling.BICUBIC)
    else:
        width, height = (max(spec.size, side * spec.shortest_side // min(picture.size)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - spec.size) // 2, (height - spec.size) // 2
        picture = picture.crop((left, top, left + spec.size, top + spec.size))
    return np.asarray(picture).reshape(spec.size, spec.size, -1)
