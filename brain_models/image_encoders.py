"""Encoders of images: vision models of Hugging Face's transformers, VGG16, a two-layer CNN, and the pixels themselves.

A built encoder holds its whole architecture in its config, so a bundle needs neither hub nor network.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from brain_models.images import ImageInput

VGG_BLOCKS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # channels and convolutions
VGG_WIDTH = 4096
TARGETS_PER_FEATURE = 8  # of a sparse projection

Layers = Sequence[tuple[str, Sequence[nn.Module | nn.Parameter]]]


@dataclass
class ImageEncoderConfig:
    """Everything an encoder is built from but its weights. `architecture` names a class of transformers, with its
    `settings`. `layer`: "projected" is the model's own embedding, a number the tokens after so many blocks (VGG16: the
    output of that module of its classifier). More than `max_features` are projected at random onto so many."""

    kind: Literal["transformers", "vgg16", "cnn", "pixels"]
    input: ImageInput
    layer: str
    max_features: int
    architecture: str | None = None
    settings: dict[str, Any] | None = None


class ImageEncoder(nn.Module):
    """Features of images: the network's, projected where they are too many."""

    mean: Float[Tensor, "colour"]
    std: Float[Tensor, "colour"]

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.network = NETWORKS[config.kind](config)
        self.register_buffer("mean", torch.tensor(config.input.mean), persistent=False)
        self.register_buffer("std", torch.tensor(config.input.std), persistent=False)

    def forward(self, images: UInt8[Tensor, "image y x colour"]) -> Float[Tensor, "image feature"]:
        pixels = images.float() / 255
        if self.config.input.uses_min_max:
            low, high = pixels.amin(dim=(1, 2, 3), keepdim=True), pixels.amax(dim=(1, 2, 3), keepdim=True)
            pixels = (pixels - low) / (high - low).clamp(min=1 / 255)
        pixels = (pixels - self.mean) / self.std
        features = self.network(rearrange(pixels, "image y x colour -> image colour y x")).flatten(1)
        return sparse_projection(features.float(), self.config.max_features)

    def num_features(self) -> int:
        """Returns how many there are of an image."""
        spec = self.config.input
        blank = torch.zeros(1, spec.size, spec.size, len(spec.mean), dtype=torch.uint8)
        with torch.no_grad():
            return self(blank).shape[1]

    def layers(self) -> Layers:
        """Returns the network's layers, top first."""
        blocks = max(
            (module for module in self.network.modules() if isinstance(module, nn.ModuleList | nn.Sequential)),
            key=len,
            default=nn.ModuleList(),
        )
        parameters = list(self.network.parameters())
        inside = {id(parameter) for parameter in blocks.parameters()}
        numbers = [number for number, parameter in enumerate(parameters) if id(parameter) in inside]
        first, last = (numbers[0], numbers[-1]) if numbers else (len(parameters), len(parameters))
        named = [("output", parameters[last + 1 :])]
        named += [(f"block{number}", list(block.parameters())) for number, block in reversed([*enumerate(blocks)])]
        return [(name, each) for name, each in [*named, ("input", parameters[:first])] if each]


def sparse_projection(features: Float[Tensor, "image feature"], max_features: int) -> Float[Tensor, "image kept"]:
    """Returns the features as they are, or added with random signs to a few of `max_features` sums each, which keeps
    distances to about 1/sqrt(max_features) (Kane and Nelson 2014, JACM 61:4). The same for the same widths."""
    width = features.shape[1]
    if width <= max_features:
        return features
    generator = torch.Generator().manual_seed(width)
    shape = (TARGETS_PER_FEATURE, width)
    targets = torch.randint(max_features, shape, generator=generator).to(features.device)
    signs = (torch.randint(2, shape, generator=generator) * 2 - 1).to(features)
    sums = features.new_zeros(len(features), max_features)
    for target, sign in zip(targets, signs, strict=True):
        sums.index_add_(1, target, features * sign)
    return sums / TARGETS_PER_FEATURE**0.5


class TransformersNetwork(nn.Module):
    """A vision model of transformers, built from its settings."""

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        import transformers

        assert config.architecture is not None
        kind = getattr(transformers, config.architecture)
        self.model = kind(kind.config_class.from_dict(dict(config.settings or {})))
        self.layer = config.layer

    def forward(self, pixels: Float[Tensor, "image colour y x"]) -> Tensor:
        if self.layer != "projected":
            return self.model(pixels, output_hidden_states=True).hidden_states[int(self.layer)]
        output = self.model(pixels)
        embedded = getattr(output, "image_embeds", None)
        if embedded is None:
            embedded = output.pooler_output
        return output.last_hidden_state.mean(dim=1) if embedded is None else embedded


class Vgg16(nn.Module):
    """VGG16 with torchvision's names of its weights (Simonyan and Zisserman 2015)."""

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width, num_convolutions in VGG_BLOCKS:
            for _ in range(num_convolutions):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(7)
        wide = [nn.Linear(49 * channels, VGG_WIDTH), nn.ReLU(), nn.Dropout()]
        wide += [nn.Linear(VGG_WIDTH, VGG_WIDTH), nn.ReLU(), nn.Dropout(), nn.Linear(VGG_WIDTH, 1000)]
        self.classifier = nn.Sequential(*wide)
        self.last = 4 if config.layer == "projected" else int(config.layer)

    def forward(self, pixels: Float[Tensor, "image colour y x"]) -> Tensor:
        pooled = self.avgpool(self.features(pixels)).flatten(1)
        return self.classifier[: self.last + 1](pooled)


class TwoLayerCnn(nn.Module):
    """Two convolutions with pooling, to be trained from scratch."""

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        colours, side = len(config.input.mean), config.input.size // 16
        self.layers = nn.Sequential(
            *(nn.Conv2d(colours, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(4)),
            *(nn.Conv2d(16, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(4)),
            *(nn.Flatten(), nn.Linear(32 * side * side, 128)),
        )

    def forward(self, pixels: Float[Tensor, "image colour y x"]) -> Tensor:
        return self.layers(pixels)


class Pixels(nn.Identity):
    """The pixels, nothing to learn."""


NETWORKS: Mapping[str, type[nn.Module]] = {
    "transformers": TransformersNetwork,
    "vgg16": Vgg16,
    "cnn": TwoLayerCnn,
    "pixels": Pixels,
}
