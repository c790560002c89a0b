"""The pretraining task: encode the visible tokens of a scan, guess the voxels of the hidden ones.

Knows sets, windows and layouts; nothing of files, ranks or the loop.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from einops import reduce, repeat
from jaxtyping import Bool, Float
from torch import Tensor, nn

from brain_models.encoder import BrainEncoder, EncoderConfig, PatchDecoder, StemName, kind_of
from brain_models.patches import PatchLayout
from data_sharding.read.batch import Batch
from pretrain.baselines.references import centre, hidden_voxels
from pretrain.errors import PretrainError
from pretrain.masked.costs import PassShape, flops_of_pass
from pretrain.masked.geometry import Geometry, WindowConfig
from pretrain.masked.masked_set import LossConfig, MaskedSet, SetSpec, at
from pretrain.masked.masking import MaskingConfig, TokenChoice
from pretrain.report.collapse import Sentinels, sampled
from pretrain.report.scores import IntervalConfig, Row, metrics_of, score_rows
from training.task import Cost, ParameterGroup, Task
from training.unfreezing import split_decay

ERROR_OF = "error_"  # a reference's, among the predictions

__all__ = ["DecoderConfig", "Geometry", "LossConfig", "MaskedVolumes", "ModelConfig", "SetSpec", "WindowConfig"]


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
class Reconstruction:
    """What was hidden of a batch, and how well it was guessed, voxel by voxel; 0 where not scored."""

    encoded: Float[Tensor, "batch visible width"]
    is_hidden: Bool[Tensor, "batch tubelet patch"]
    is_scored: Bool[Tensor, "batch time voxel"]
    truth: Float[Tensor, "batch time voxel"]  # about the training mean
    squared: Float[Tensor, "batch time voxel"]


class MaskedVolumes(Task):
    """Reconstruction of hidden tokens, scored on measured voxels, about the training split's voxel mean.

    One trunk for all sets; sets whose tokens have the same shape share a stem and an output of the decoder. A batch is
    of one set. Where a set has `references`, `predict` scores them beside the model on the same voxels.
    """

    def __init__(
        self,
        config: ModelConfig,
        sets: Mapping[str, SetSpec],
        *,
        masking: MaskingConfig,
        loss: LossConfig,
        batch_size: int,
        weight_decay: float,
    ) -> None:
        super().__init__()
        self.config = config
        self.sentinels: Sentinels | None = None  # where given, `predict` and `metrics` watch the embedding
        self.weight_decay = weight_decay
        self.batch_size = batch_size
        stem_of_set = stem_names(sets)
        shapes = {stem: sets[name].geometry for name, stem in reversed(stem_of_set.items())}
        shapes = {stem: shapes[stem] for stem in stem_of_set.values()}
        self.encoder = BrainEncoder(
            config.encoder, {stem: (shape.layout, shape.window.tubelet_frames) for stem, shape in shapes.items()}
        )
        self.decoder = PatchDecoder(
            config.encoder,
            width=config.decoder.width,
            depth=config.decoder.depth,
            num_features={stem: self.encoder.stem(stem).num_features for stem in shapes},
        )
        self.names = list(sets)
        self.sets = nn.ModuleList(
            MaskedSet(name, stem_of_set[name], spec, masking=masking, loss=loss) for name, spec in sets.items()
        )
        self.num_columns = max(self.set_named(name).regions.num_columns for name in sets)

    def set_named(self, name: str) -> MaskedSet:
        """The set of that name; of a single set, batches need not name it."""
        part = self.sets[self.names.index(name) if name or len(self.names) > 1 else 0]
        assert isinstance(part, MaskedSet)
        return part

    def set_voxel_statistics(
        self, stem: StemName, mean: Float[Tensor, "voxel"], deviation: Float[Tensor, "voxel"]
    ) -> None:
        """Store the training split's voxel mean and deviation in a stem, with which they travel."""
        self.encoder.stem(stem).voxel_offset.copy_(mean)
        self.encoder.stem(stem).voxel_scale.copy_(deviation)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The loss: weighted squared error over measured voxels of hidden tokens, divided by a constant; of several
        sets also under the set's name."""
        part = self.set_named(batch.set_name)
        choice = part.masker.choose(batch.sample_seed)
        features = self._features(batch)
        residual = self._guess(features, batch, choice).float() - at(features, choice.hidden)
        counted = part.counted(self.encoder.stem(part.stem_name), batch.is_measured, choice)
        squared = (residual * counted).square().sum(dim=(1, 2))
        loss = (batch.weight * squared).sum() / (self.batch_size * part.values_per_sample)
        if len(self.names) == 1:
            return {"loss": loss}
        return {"loss": loss + self._untouched(part.stem_name), f"loss/{part.name}": loss.detach()}

    def predict(self, batch: Batch) -> dict[str, Tensor]:
        """Per sample and region (the last column: no region): squared error of the model and of each reference, total
        about the training mean, and the number of values they are summed over; per sample, the loss's weighted error,
        where there are sentinels the mean encoded token and a few single ones.
        """
        part, found = self.set_named(batch.set_name), self.reconstruct(batch)
        truth, is_scored = found.truth, found.is_scored
        sums = {
            "error": part.by_region(found.squared),
            "total": part.by_region(truth.square() * is_scored),
            "count": part.by_region(is_scored.float()),
        }
        if part.references is not None:
            guesses = part.references.guess(batch.values.cpu(), batch.is_measured.cpu(), found.is_hidden.cpu())
            # Registered weights bring the voxel mean they were trained with; the references are about this run's own.
            shift = part.references.offset.to(truth.device) - self.encoder.stem(part.stem_name).voxel_offset
            sums["total"] = part.by_region((truth - shift).square() * is_scored)  # about this run's training mean, too
            for name, values in guesses.items():
                residual = values.to(truth.device) + shift - truth
                sums[f"{ERROR_OF}{name}"] = part.by_region(residual.square() * is_scored)
            every = {name for each in self.names for name in self._errors_beside(each)}
            for name in sorted(every - sums.keys()):
                sums[name] = torch.full_like(sums["error"], torch.nan)  # another set's: all samples have the same names
        padding = self.num_columns - part.regions.num_columns
        sums = {name: nn.functional.pad(values, (0, padding)) for name, values in sums.items()}
        of_set = torch.full((len(truth),), self.names.index(part.name), device=truth.device)
        sums |= {"weighted": (found.squared * part.voxel_weight).sum(dim=(1, 2)), "set": of_set}
        if self.sentinels is not None:
            sums |= sampled(found.encoded, self.sentinels.config.tokens_per_sample)
        return sums

    def reconstruct(self, batch: Batch) -> Reconstruction:
        """What is hidden of each sample, and how well each of its voxels is guessed."""
        part = self.set_named(batch.set_name)
        stem = self.encoder.stem(part.stem_name)
        choice = part.masker.choose(batch.sample_seed)
        encoded, positions = self._encode(self._features(batch), batch, choice)
        guess = self._decode(encoded, positions, part, choice).float()
        is_hidden = part.hidden_patches(choice)
        is_scored = hidden_voxels(is_hidden, part.patch_of_voxel, batch.values.shape[1])
        is_scored = is_scored & batch.is_measured[:, None]
        truth = centre(batch.values, batch.is_measured, stem.voxel_offset)
        squared = (part.by_voxel(stem, guess, choice) * stem.voxel_scale - truth).square() * is_scored
        return Reconstruction(encoded, is_hidden, is_scored, truth, squared)

    def patch_errors(
        self, batch: Batch, hidden: Bool[Tensor, "patch"]
    ) -> tuple[Float[Tensor, "batch patch"], Float[Tensor, "batch patch"]]:
        """With these patches hidden in all frames: squared error summed over each, 0 where visible; and the total
        about the training mean, of all."""
        part = self.set_named(batch.set_name)
        stem = self.encoder.stem(part.stem_name)
        choice = hiding(hidden, part.masker.num_tubelets, len(batch.weight))
        features = self._features(batch)
        scale = stem.by_token(stem.voxel_scale.expand(1, stem.tubelet_frames, -1)) * stem.measured(batch.is_measured)
        by_patch = "batch (tubelet patch) feature -> batch patch"
        patches = part.masker.num_patches
        residual = self._guess(features, batch, choice).float() - at(features, choice.hidden)
        error = (residual * at(scale, choice.hidden % patches)).square()
        truth = features * scale.repeat(1, part.masker.num_tubelets, 1)
        total = reduce(truth.square(), by_patch, "sum", patch=patches)
        errors = torch.zeros_like(total)
        errors[:, hidden] = reduce(error, by_patch, "sum", patch=int(hidden.sum()))
        return errors, total

    def encode_visible(self, batch: Batch) -> Float[Tensor, "batch visible width"]:
        """The encoded tokens that `predict` guesses from."""
        choice = self.set_named(batch.set_name).masker.choose(batch.sample_seed)
        encoded, _ = self._encode(self._features(batch), batch, choice)
        return encoded

    def metrics(self, predictions: dict[str, Tensor]) -> dict[str, float]:
        """loss and r2 with their parts, and those of the sentinels; of several sets <set>/r2 and so on, and the loss
        weighted as training is."""
        by_set = {}
        for name, rows in self.by_set(predictions).items():
            part = self.set_named(name)
            loss = float(rows["weighted"].double().sum() / (len(rows["weighted"]) * part.values_per_sample))
            by_set[name] = metrics_of(rows, part.regions, values_per_sample=part.values_per_sample) | {"loss": loss}
            if self.sentinels is not None:
                by_set[name] |= self.sentinels.metrics(name, rows)
        if len(self.names) == 1:
            return by_set[self.names[0]]
        weights = {name: self.set_named(name).weight for name in by_set}
        whole = sum(weights[name] * found["loss"] for name, found in by_set.items()) / sum(weights.values())
        return {"loss": whole} | {
            f"{name}/{key}": value for name, found in by_set.items() for key, value in found.items()
        }

    def score_table(
        self, predictions: dict[str, Tensor], subjects: Mapping[str, Sequence[str]], config: IntervalConfig
    ) -> dict[str, list[Row]]:
        """By set, how well everything, each group and each region was guessed; `subjects` of each set's rows."""
        return {
            name: score_rows(rows, self.set_named(name).regions, subjects=subjects[name], config=config)
            for name, rows in self.by_set(predictions).items()
        }

    def by_set(self, predictions: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """The predictions of each set that has any, with its own number of region columns."""
        found = {}
        for index, name in enumerate(self.names):
            rows = predictions["set"] == index
            columns, beside = self.set_named(name).regions.num_columns, self._errors_beside(name)
            if bool(rows.any()):
                found[name] = {
                    key: values[rows][:, :columns] if is_by_region(key) else values[rows]
                    for key, values in predictions.items()
                    if key in beside or not key.startswith(ERROR_OF)
                }
        return found

    def _errors_beside(self, name: str) -> list[str]:
        """The predictions that a set's references are scored by."""
        references = self.set_named(name).references
        return [] if references is None else [f"{ERROR_OF}{each}" for each in references.names]

    def parameter_groups(self) -> list[ParameterGroup]:
        return split_decay(
            "model",
            [self.encoder, self.decoder],
            learning_rate_scale=1.0,
            weight_decay=self.weight_decay,
            opens_at=0,
        )

    def cost(self, batch: Batch) -> Cost:
        shape = self.pass_shape(self.set_named(batch.set_name), rows=len(batch.weight))
        flops = flops_of_pass(self.config.encoder, self.config.decoder, shape)
        return Cost(tokens=shape.rows * shape.num_tokens, flops=flops)

    def pass_shape(self, part: MaskedSet, *, rows: int) -> PassShape:
        """What a forward pass on `rows` samples of a set holds."""
        num_hidden = part.masker.num_hidden
        num_features = self.encoder.stem(part.stem_name).num_features
        return PassShape(rows, part.masker.num_tokens - num_hidden, num_hidden, num_features)

    def checkpoint_activations(self) -> None:
        self.encoder.recomputes_activations = self.decoder.recomputes_activations = True

    def load_registered(self, folder: Path) -> None:
        """Take over a registered encoder's trunk, and its stems where the token shape is known; a new shape's stem is
        one of theirs resampled, of the same kind if there is one. The decoder starts anew."""
        from brain_models import bundle  # needs PyYAML, which a machine that only trains may lack

        theirs = bundle.load(folder).encoder
        if theirs.config != self.encoder.config:
            raise PretrainError(
                f"{folder}: the registered encoder is {theirs.config}, this run's model is {self.encoder.config}; "
                "use the model it was trained with, or train.start.registered=null"
            )
        trunk = {key: value for key, value in theirs.state_dict().items() if not key.startswith("stems.")}
        self.encoder.load_state_dict(trunk, strict=False)
        for name in self.encoder.stems:
            mine = self.encoder.stem(name)
            known = {other: theirs.stem(other) for other in theirs.stems}
            same = next((stem for stem in known.values() if stem.is_like(mine)), None)
            if same is not None:
                mine.load_state_dict(same.state_dict())
            else:
                mine.start_from(known[min(known, key=lambda other: kind_of(other) != kind_of(name))])

    def hidden_patches(self, batch: Batch) -> Bool[Tensor, "batch tubelet patch"]:
        """True for the tokens that this batch hides."""
        part = self.set_named(batch.set_name)
        return part.hidden_patches(part.masker.choose(batch.sample_seed))

    def _features(self, batch: Batch) -> Float[Tensor, "batch token feature"]:
        stem = self.encoder.stem(self.set_named(batch.set_name).stem_name)
        return stem.features(batch.values, batch.is_measured)

    def _guess(
        self, features: Float[Tensor, "batch token feature"], batch: Batch, choice: TokenChoice
    ) -> Float[Tensor, "batch hidden feature"]:
        """Standardised voxels of the hidden tokens, guessed from the visible ones."""
        encoded, positions = self._encode(features, batch, choice)
        return self._decode(encoded, positions, self.set_named(batch.set_name), choice)

    def _encode(
        self, features: Float[Tensor, "batch token feature"], batch: Batch, choice: TokenChoice
    ) -> tuple[Float[Tensor, "batch visible width"], Float[Tensor, "batch token 4"]]:
        """The visible tokens, encoded, and every token's position."""
        part = self.set_named(batch.set_name)
        positions = self.encoder.positions(part.stem_name, part.masker.num_tubelets, batch.repetition_time_s)
        encoded = self.encoder(at(features, choice.visible), at(positions, choice.visible), part.stem_name)
        return encoded, positions

    def _decode(
        self,
        encoded: Float[Tensor, "batch visible width"],
        positions: Float[Tensor, "batch token 4"],
        part: MaskedSet,
        choice: TokenChoice,
    ) -> Float[Tensor, "batch hidden feature"]:
        visible_positions = at(positions, choice.visible)
        return self.decoder(encoded, visible_positions, at(positions, choice.hidden), part.stem_name)

    def _untouched(self, used: StemName) -> Tensor:
        """0, with the stems and outputs this step does not use in its graph: their gradient is then zero, not absent,
        so that every engine moves them alike. Through their modules, because ZeRO 3 gathers weights there."""
        width = self.decoder.norm.normalized_shape[0]
        sums = [
            stem.project(stem.voxel_offset.new_zeros(1, stem.num_features)).sum()
            + self.decoder.predict[name](stem.voxel_offset.new_zeros(1, width)).sum()
            for name, stem in ((name, self.encoder.stem(name)) for name in self.encoder.stems)
            if name != used
        ]
        return 0.0 * torch.stack([*sums, self.encoder.stem(used).voxel_offset.new_zeros(())]).sum()


def is_by_region(name: str) -> bool:
    """True for the predictions that have a column a region."""
    return name in ("error", "total", "count") or name.startswith(ERROR_OF)


def hiding(hidden: Bool[Tensor, "patch"], num_tubelets: int, num_samples: int) -> TokenChoice:
    """These patches hidden in all tubelets of every sample."""
    tokens = repeat(hidden, "patch -> (tubelet patch)", tubelet=num_tubelets)
    return TokenChoice(*(torch.nonzero(one)[:, 0].expand(num_samples, -1) for one in (tokens, ~tokens)))


def stem_names(sets: Mapping[str, SetSpec]) -> dict[str, StemName]:
    """The stem each set reads with: one a token shape, the first of a kind named as the kind."""
    names: dict[tuple[str, str, int], StemName] = {}
    found = {}
    for set_name, spec in sets.items():
        layout, frames = spec.geometry.layout, spec.geometry.window.tubelet_frames
        shape = (spec.kind, layout.fingerprint, frames)
        is_first = not any(kind == spec.kind for kind, _, _ in names)
        names.setdefault(shape, spec.kind if is_first else f"{spec.kind}_{shape_hash(layout, frames)}")
        found[set_name] = names[shape]
    return found


def shape_hash(layout: PatchLayout, tubelet_frames: int) -> str:
    """Eight hexadecimal digits that name a token shape."""
    return sha256(f"{layout.fingerprint} {tubelet_frames}".encode()).hexdigest()[:8]
