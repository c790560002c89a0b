"""The pretraining task: encode the visible tokens of a scan, guess the voxels of the hidden ones.

Knows windows, layouts and atlases; nothing of files, ranks or the loop.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from brain_models import bundle
from brain_models.atlas import Atlas
from brain_models.encoder import BrainEncoder, EncoderConfig, PatchDecoder, TokenKind
from brain_models.patches import PatchLayout
from brain_models.space import BrainSpace
from data_sharding.reader import Batch
from pretrain.errors import PretrainError
from pretrain.masking import Masker, MaskingConfig, TokenChoice, columns_of_groups
from pretrain.references import References, centre, hidden_voxels
from pretrain.scores import Regions, metrics_of, report_of
from training.task import ParameterGroup, Task
from training.unfreezing import split_decay


@dataclass
class DecoderConfig:
    """Sizes of the decoder, which is thrown away after pretraining."""

    width: int
    depth: int


@dataclass
class ModelConfig:
    encoder: EncoderConfig
    decoder: DecoderConfig


@dataclass
class WindowConfig:
    """What one sample of a kind is, and how it is cut into tokens."""

    window_frames: int
    tubelet_frames: int
    patch_voxels: int


@dataclass(frozen=True, eq=False)
class Geometry:
    """Where the voxels are: everything that masking and scores need of a space, an atlas and a window."""

    space: BrainSpace
    atlas: Atlas
    layout: PatchLayout
    window: WindowConfig

    @classmethod
    def of(cls, space: BrainSpace, atlas: Atlas, window: WindowConfig) -> "Geometry":
        return cls(space, atlas, PatchLayout(space, window.patch_voxels), window)

    @property
    def num_tubelets(self) -> int:
        return self.window.window_frames // self.window.tubelet_frames

    def masker(self, config: MaskingConfig) -> Masker:
        """The masker of this geometry; MaskingError when the budget is out of reach."""
        shares, allowed = self.membership(config)
        return Masker(config, shares, allowed=allowed, num_tubelets=self.num_tubelets)

    def membership(self, config: MaskingConfig) -> tuple[Float[Tensor, "patch region"], list[int] | None]:
        """Shares of each patch in each region, and the columns that may be hidden (None = all)."""
        membership = self.atlas.membership(self.layout, self.space)
        allowed = columns_of_groups(
            config.groups, atlas_groups=self.atlas.groups, region_ids=membership.region_ids.tolist()
        )
        return torch.from_numpy(membership.shares), allowed


class MaskedVolumes(Task):
    """Reconstruction of hidden tokens, scored on measured voxels, about the training split's voxel mean.

    `references`, when set, are scored beside the model on the same voxels by `predict`.
    """

    kind: TokenKind
    references: References | None
    region_of_voxel: Tensor
    patch_of_voxel: Tensor
    place_of_voxel: Tensor

    def __init__(
        self,
        config: ModelConfig,
        geometry: Geometry,
        *,
        kind: TokenKind,
        masking: MaskingConfig,
        batch_size: int,
        weight_decay: float,
    ) -> None:
        super().__init__()
        window, layout = geometry.window, geometry.layout
        self.kind = kind
        self.masker = geometry.masker(masking)
        self.weight_decay = weight_decay
        self.references = None
        self.encoder = BrainEncoder(config.encoder, {kind: (layout, window.tubelet_frames)})
        self.decoder = PatchDecoder(
            config.encoder,
            width=config.decoder.width,
            depth=config.decoder.depth,
            num_features=self.encoder.stem(kind).num_features,
        )
        values_per_token = float(layout.voxels_per_patch.mean()) * window.tubelet_frames
        self.values_per_sample = self.masker.num_hidden * values_per_token  # hidden ones, as if all were measured
        self.batch_size = batch_size
        self.regions = Regions.of(geometry.atlas)
        self.register_buffer("region_of_voxel", torch.from_numpy(self.regions.column_of_voxel), persistent=False)
        self.register_buffer("patch_of_voxel", torch.from_numpy(layout.patch_of_voxel), persistent=False)
        place = np.empty(layout.num_voxels, dtype=np.int64)
        place[layout.gather[layout.is_valid]] = np.nonzero(layout.is_valid)[1]
        self.register_buffer("place_of_voxel", torch.from_numpy(place), persistent=False)

    def set_voxel_statistics(self, mean: Float[Tensor, "voxel"], deviation: Float[Tensor, "voxel"]) -> None:
        """Store the training split's voxel mean and deviation in the stem, with which they travel."""
        stem = self.encoder.stem(self.kind)
        stem.voxel_offset.copy_(mean)
        stem.voxel_scale.copy_(deviation)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The loss: weighted squared error over measured voxels of hidden tokens, divided by a constant."""
        choice = self.masker.choose(batch.sample_seed)
        features = self._features(batch)
        guess = self._guess(features, batch, choice)
        residual = guess.float() - _at(features, choice.hidden)
        counted = self._weights(batch, choice)  # voxel scale where measured, else 0
        squared = (residual * counted).square().sum(dim=(1, 2))
        return {"loss": (batch.weight * squared).sum() / (self.batch_size * self.values_per_sample)}

    def predict(self, batch: Batch) -> dict[str, Tensor]:
        """Per sample and region (the last column: no region): squared error of the model and of each reference, total
        about the training mean, and the number of values they are summed over."""
        choice = self.masker.choose(batch.sample_seed)
        guess = self._guess(self._features(batch), batch, choice).float()
        is_hidden = self.hidden_patches(batch)
        is_scored = hidden_voxels(is_hidden, self.patch_of_voxel, batch.values.shape[1])
        is_scored = is_scored & batch.is_measured[:, None]
        stem = self.encoder.stem(self.kind)
        truth = centre(batch.values, batch.is_measured, stem.voxel_offset)
        model = self._by_voxel(guess, choice) * stem.voxel_scale
        sums = {
            "error": self._by_region((model - truth).square() * is_scored),
            "total": self._by_region(truth.square() * is_scored),
            "count": self._by_region(is_scored.float()),
        }
        if self.references is not None:
            guesses = self.references.guess(batch.values.cpu(), batch.is_measured.cpu(), is_hidden.cpu())
            for name, values in guesses.items():
                squared = (values.to(truth.device) - truth).square() * is_scored
                sums[f"error_{name}"] = self._by_region(squared)
        return sums

    def metrics(self, predictions: dict[str, Tensor]) -> dict[str, float]:
        return metrics_of(predictions, self.regions, values_per_sample=self.values_per_sample)

    def report(self, predictions: dict[str, Tensor]) -> dict[str, object]:
        """The whole table of a split; see pretrain.scores."""
        return report_of(predictions, self.regions, values_per_sample=self.values_per_sample)

    def parameter_groups(self) -> list[ParameterGroup]:
        return split_decay(
            "model",
            [self.encoder, self.decoder],
            learning_rate_scale=1.0,
            weight_decay=self.weight_decay,
            opens_at_step=0,
        )

    def exported(self) -> nn.Module:
        return self.encoder

    def load_registered(self, folder: Path) -> None:
        """Take over a registered encoder of the same sizes, space and token shape; the decoder starts anew."""
        weights = bundle.load(folder).encoder.state_dict()
        try:
            self.encoder.load_state_dict(weights)
        except RuntimeError as error:
            raise PretrainError(
                f"{folder}: the registered encoder has another size, space or token shape ({error}); "
                "use the model, space and windows it was trained with, or train.start.registered=null"
            ) from error

    def hidden_patches(self, batch: Batch) -> Bool[Tensor, "batch tubelet patch"]:
        """True for the tokens that this batch hides."""
        hidden = self.masker.choose(batch.sample_seed).hidden
        flat = torch.zeros(len(hidden), self.masker.num_tokens, dtype=torch.bool, device=hidden.device)
        flat.scatter_(1, hidden, True)
        return rearrange(flat, "batch (tubelet patch) -> batch tubelet patch", patch=self.masker.num_patches)

    def _features(self, batch: Batch) -> Float[Tensor, "batch token feature"]:
        return self.encoder.stem(self.kind).features(batch.values, batch.is_measured)

    def _guess(
        self, features: Float[Tensor, "batch token feature"], batch: Batch, choice: TokenChoice
    ) -> Float[Tensor, "batch hidden feature"]:
        """Standardised voxels of the hidden tokens, guessed from the visible ones."""
        positions = self.encoder.positions(self.kind, self.masker.num_tubelets, batch.repetition_time_s)
        visible_positions = _at(positions, choice.visible)
        encoded = self.encoder(_at(features, choice.visible), visible_positions, self.kind)
        return self.decoder(encoded, visible_positions, _at(positions, choice.hidden))

    def _weights(self, batch: Batch, choice: TokenChoice) -> Float[Tensor, "batch hidden feature"]:
        """The voxel's scale where a hidden feature stands for a measured voxel, else 0."""
        stem = self.encoder.stem(self.kind)
        scale = stem.by_token(stem.voxel_scale.expand(1, stem.tubelet_frames, -1))
        scaled = stem.measured(batch.is_measured) * scale
        return _at(scaled, choice.hidden % self.masker.num_patches)

    def _by_voxel(
        self, tokens: Float[Tensor, "batch hidden feature"], choice: TokenChoice
    ) -> Float[Tensor, "batch time voxel"]:
        """Features of hidden tokens put back where they belong on the packed axis, 0 elsewhere."""
        stem = self.encoder.stem(self.kind)
        every = tokens.new_zeros(len(tokens), self.masker.num_tokens, tokens.shape[2])
        every.scatter_(1, choice.hidden[:, :, None].expand_as(tokens), tokens)
        places = rearrange(
            every,
            "batch (tubelet patch) (frame place) -> batch (tubelet frame) patch place",
            patch=self.masker.num_patches,
            frame=stem.tubelet_frames,
        )
        return places[:, :, self.patch_of_voxel, self.place_of_voxel]

    def _by_region(self, values: Float[Tensor, "batch time voxel"]) -> Float[Tensor, "batch region"]:
        sums = values.new_zeros(len(values), self.regions.num_columns)
        return sums.index_add_(1, self.region_of_voxel, values.sum(dim=1))


def _at(
    tokens: Float[Tensor, "batch token feature"], chosen: Int64[Tensor, "batch chosen"]
) -> Float[Tensor, "batch chosen feature"]:
    return tokens.gather(1, chosen[:, :, None].expand(-1, -1, tokens.shape[2]))
