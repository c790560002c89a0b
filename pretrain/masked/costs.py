"""The sizes of the model, and what they cost: operations of a pass, and bytes it keeps for the backward pass.

Pure arithmetic over shapes; tests hold it to what PyTorch counts and keeps.
"""

from dataclasses import dataclass
from typing import Literal

from brain_models.encoder import EncoderConfig

FORWARD_AND_BACKWARD = 3  # a product of matrices has two more in the backward pass, one for each factor
ONLY_WEIGHTS = 2  # one more, where the input is data
FP32, BF16 = 4, 2


@dataclass
class DecoderConfig:
    """Sizes of the decoder, which is thrown away after pretraining."""

    width: int
    depth: int


@dataclass
class ModelConfig:
    encoder: EncoderConfig
    decoder: DecoderConfig


@dataclass(frozen=True)
class PassShape:
    """Rows of a micro-batch, tokens seen and guessed of each, and the values of a token."""

    rows: int
    num_visible: int
    num_hidden: int
    num_features: int

    @property
    def num_tokens(self) -> int:
        return self.num_visible + self.num_hidden


def flops_of_pass(model: ModelConfig, shape: PassShape) -> float:
    """Floating-point operations of a forward and backward pass: matrix products and attention, 2 per multiply-add."""
    encoder, decoder = model.encoder, model.decoder
    seen, hidden, width, guessed = shape.num_visible, shape.num_hidden, encoder.width, decoder.width
    waves = 2 * encoder.num_frequencies
    inputs = seen * shape.num_features * width + seen * waves * (width + guessed) + hidden * waves * guessed
    block = seen * width * (4 * width + 2 * mlp_width(width, encoder)) + 2 * seen * seen * width
    cross = 2 * (seen + hidden) * guessed * guessed + 2 * hidden * guessed * mlp_width(guessed, encoder)
    cross += 2 * hidden * seen * guessed
    rest = (
        encoder.depth * block + decoder.depth * cross + seen * width * guessed + hidden * guessed * shape.num_features
    )
    phases = (2 * seen + hidden) * 4 * encoder.num_frequencies  # of positions, which nothing learns
    return 2.0 * shape.rows * (FORWARD_AND_BACKWARD * rest + ONLY_WEIGHTS * inputs + phases)


def bytes_kept(model: ModelConfig, shape: PassShape, *, precision: Literal["fp32", "bf16"], recomputes: bool) -> int:
    """Bytes of activations that the forward pass keeps for the backward pass.

    `recomputes`: blocks keep their inputs only; the largest block's own activations come on top, while it is computed
    again. In bf16 (of a GPU) products keep two bytes per value and their weights once more in two, norms keep four.
    """
    encoder, decoder = model.encoder, model.decoder
    small = BF16 if precision == "bf16" else FP32
    copied = BF16 if precision == "bf16" else 0
    seen, hidden, width, guessed = shape.num_visible, shape.num_hidden, encoder.width, decoder.width
    waves = 2 * encoder.num_frequencies
    block = attention_kept(seen, seen, width, encoder, small) + mlp_kept(seen, width, encoder, small)
    cross = attention_kept(hidden, seen, guessed, encoder, small) + norm_kept(seen, guessed, small)
    cross += mlp_kept(hidden, guessed, encoder, small)
    if precision == "fp32":
        cross -= FP32 * seen * guessed  # the blocks' norms share what they are given; in bf16 each makes a copy
    ends = small * (seen * shape.num_features + waves * (2 * seen + hidden))
    ends += norm_kept(seen, width, small) + norm_kept(hidden, guessed, small)
    ends += FP32 * (2 * hidden * shape.num_features + (seen * guessed if precision == "fp32" else 0))
    ends_weights = copied * ((shape.num_features + guessed + waves) * width + (waves + shape.num_features) * guessed)
    block_total = shape.rows * block + copied * block_weights(width, encoder)
    cross_total = shape.rows * cross + copied * block_weights(guessed, encoder)
    if not recomputes:
        return shape.rows * ends + ends_weights + encoder.depth * block_total + decoder.depth * cross_total
    inputs = small * (encoder.depth * seen * width + decoder.depth * hidden * guessed + seen * guessed)
    if precision == "fp32":
        inputs -= FP32 * seen * guessed  # counted in `ends`
    return shape.rows * (ends + inputs) + ends_weights + max(block_total, cross_total)


def block_weights(width: int, config: EncoderConfig) -> int:
    """Values of a block's matrices."""
    return width * (4 * width + 2 * mlp_width(width, config))


def attention_kept(num_queries: int, num_others: int, width: int, config: EncoderConfig, small: int) -> int:
    """Bytes a row's attention keeps: the norm, queries, keys and values, what was attended to, and its normaliser."""
    products = small * width * (2 * num_queries + 2 * num_others)
    return norm_kept(num_queries, width, small) + products + FP32 * config.num_heads * num_queries


def mlp_kept(num_tokens: int, width: int, config: EncoderConfig, small: int) -> int:
    """Bytes a row's MLP keeps: the norm, and the hidden layer before and after its nonlinearity."""
    return norm_kept(num_tokens, width, small) + 2 * small * num_tokens * mlp_width(width, config)


def norm_kept(num_tokens: int, width: int, small: int) -> int:
    """Bytes a row's norm keeps: its input, its output for the matrix that follows, mean and deviation."""
    return num_tokens * (FP32 * width + small * width + 2 * FP32)


def mlp_width(width: int, config: EncoderConfig) -> int:
    """The hidden width of an MLP."""
    return int(width * config.mlp_ratio)
