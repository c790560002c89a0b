"""The pretraining task: encode the visible tokens of a scan, guess the voxels of the hidden ones.

Knows sets, windows and layouts; nothing of files, ranks or the loop.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from einops import rearrange, reduce, repeat
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from brain_models.encoder import BrainEncoder, PatchDecoder, Stem, StemName, kind_of
from brain_models.patches import PatchLayout
from data_sharding.read.batch import WindowBatch
from pretrain.baselines.references import centre, hidden_voxels
from pretrain.errors import PretrainError
from pretrain.masked.costs import ModelConfig, PassShape, flops_of_pass
from pretrain.masked.masked_set import LossConfig, MaskedSet, SetSpec
from pretrain.masked.masking import MaskingConfig, TokenChoice
from pretrain.report.collapse import Sentinels, sampled
from pretrain.report.scores import metrics_of
from training.task import Cost, ParameterGroup, Task
from training.unfreezing import split_decay


@dataclass(frozen=True)
class MaskedBatch:
    """A batch with everything a forward pass looks up once: its set, the set's stem, what is hidden, the features."""

    batch: WindowBatch
    set: MaskedSet
    stem: Stem
    choice: TokenChoice
    features: Float[Tensor, "batch token feature"]  # standardised voxels; 0 where not measured or outside the brain

    @property
    def hidden_patch(self) -> Int64[Tensor, "batch hidden"]:
        """The patch of each hidden token."""
        return self.choice.hidden % self.set.masker.num_patches

    def error_scale(self, root_weight: Tensor | float = 1.0) -> Float[Tensor, "batch patch feature"]:
        """What turns a residual of features into one of voxels: the voxel's scale, times the root of its weight; 0
        where it is not measured."""
        scale = self.stem.by_token(self.stem.voxel_scale.expand(1, self.stem.tubelet_frames, -1))
        return self.stem.measured(self.batch.is_measured) * (scale * root_weight)


@dataclass(frozen=True)
class Guess:
    """The encoded visible tokens, and the standardised voxels guessed from them for the hidden ones."""

    encoded: Float[Tensor, "batch visible width"]
    hidden: Float[Tensor, "batch hidden feature"]


@dataclass
class Reconstruction:
    """What was hidden of a batch, and how well it was guessed, voxel by voxel; 0 where not scored."""

    encoded: Float[Tensor, "batch visible width"]
    is_scored: Bool[Tensor, "batch time voxel"]
    truth: Float[Tensor, "batch time voxel"]  # about the mean that the stem holds
    guessed: Float[Tensor, "batch time voxel"]
    squared: Float[Tensor, "batch time voxel"]


class MaskedVolumes(Task):
    """Reconstruction of hidden tokens, scored on measured voxels, about the training split's voxel mean.

    One trunk for all sets; sets whose tokens have the same shape share a stem and an output of the decoder. A batch is
    of one set.
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
        """The set of that name; batches of a run on a single set need not name it."""
        one = self.sets[self.names.index(name) if name or len(self.names) > 1 else 0]
        assert isinstance(one, MaskedSet)
        return one

    def set_voxel_statistics(
        self, stem: StemName, mean: Float[Tensor, "voxel"], deviation: Float[Tensor, "voxel"]
    ) -> None:
        """Store the training split's voxel mean and deviation in a stem, with which they travel."""
        self.encoder.stem(stem).voxel_offset.copy_(mean)
        self.encoder.stem(stem).voxel_scale.copy_(deviation)

    def forward(self, batch: WindowBatch) -> dict[str, Tensor]:
        """The loss: weighted squared error over measured voxels of hidden tokens, divided by a constant; of several
        sets also under the set's name."""
        masked = self.mask(batch)
        scale = take_tokens(masked.error_scale(masked.set.root_weight), masked.hidden_patch)
        squared = (self.residual(masked) * scale).square().sum(dim=(1, 2))
        loss = (batch.weight * squared).sum() / (self.batch_size * masked.set.values_per_sample)
        if len(self.names) == 1:
            return {"loss": loss}
        return {"loss": loss + self._untouched(masked.set.stem_name), f"loss/{masked.set.name}": loss.detach()}

    def mask(self, batch: WindowBatch, choice: TokenChoice | None = None) -> MaskedBatch:
        """The batch with its hidden tokens: those that its samples' seeds choose, unless a choice is given."""
        own = self.set_named(batch.set_name)
        stem = self.encoder.stem(own.stem_name)
        choice = choice or own.masker.choose(batch.sample_seed)
        return MaskedBatch(batch, own, stem, choice, stem.features(batch.values, batch.is_measured))

    def guess(self, masked: MaskedBatch) -> Guess:
        """The hidden tokens, guessed from the visible ones."""
        name, visible, hidden = masked.set.stem_name, masked.choice.visible, masked.choice.hidden
        positions = self.encoder.positions(name, masked.set.masker.num_tubelets, masked.batch.repetition_time_s)
        visible_positions = take_tokens(positions, visible)
        encoded = self.encoder(take_tokens(masked.features, visible), visible_positions, name)
        guessed = self.decoder(encoded, visible_positions, take_tokens(positions, hidden), name)
        return Guess(encoded, guessed.float())

    def residual(self, masked: MaskedBatch) -> Float[Tensor, "batch hidden feature"]:
        """Guess minus truth of the hidden tokens, in standardised voxels."""
        return self.guess(masked).hidden - take_tokens(masked.features, masked.choice.hidden)

    def reconstruct(self, batch: WindowBatch) -> Reconstruction:
        """What is hidden of each sample, and how well each of its voxels is guessed."""
        masked = self.mask(batch)
        own, stem, guess = masked.set, masked.stem, self.guess(masked)
        is_scored = hidden_voxels(own.is_hidden(masked.choice), own.patch_of_voxel, batch.values.shape[1])
        is_scored = is_scored & batch.is_measured[:, None]
        truth = centre(batch.values, batch.is_measured, stem.voxel_offset)
        guessed = own.by_voxel(stem, guess.hidden, masked.choice) * stem.voxel_scale
        return Reconstruction(guess.encoded, is_scored, truth, guessed, (guessed - truth).square() * is_scored)

    def patch_errors(
        self, batch: WindowBatch, hidden: Bool[Tensor, "patch"]
    ) -> tuple[Float[Tensor, "batch patch"], Float[Tensor, "batch patch"]]:
        """With these patches hidden in all frames: squared error summed over each, 0 where visible; and the total
        about the training mean, of all."""
        masker = self.set_named(batch.set_name).masker
        masked = self.mask(batch, hiding(hidden, masker.num_tubelets, len(batch.weight)))
        scale = masked.error_scale()
        by_patch = "batch (tubelet patch) feature -> batch patch"
        error = (self.residual(masked) * take_tokens(scale, masked.hidden_patch)).square()
        truth = masked.features * scale.repeat(1, masker.num_tubelets, 1)
        total = reduce(truth.square(), by_patch, "sum", patch=masker.num_patches)
        errors = torch.zeros_like(total)
        errors[:, hidden] = reduce(error, by_patch, "sum", patch=int(hidden.sum()))
        return errors, total

    def predict(self, batch: WindowBatch) -> dict[str, Tensor]:
        """Per sample and region (the last column: no region): squared error, total about this run's training mean, and
        the number of values they are summed over; per sample, the weighted error of the loss, its set and its seed;
        where there are sentinels, the mean encoded token and a few single ones."""
        own, found = self.set_named(batch.set_name), self.reconstruct(batch)
        # Registered weights bring the voxel mean they were trained with; what scores 0 is this run's own.
        offset = self.encoder.stem(own.stem_name).voxel_offset
        shift = 0.0 if own.training_mean is None else own.training_mean - offset
        sums = {
            "error": own.by_region(found.squared),
            "total": own.by_region((found.truth - shift).square() * found.is_scored),
            "count": own.by_region(found.is_scored.float()),
        }
        padding = self.num_columns - own.regions.num_columns
        rows = {name: nn.functional.pad(values, (0, padding)) for name, values in sums.items()}
        rows["weighted"] = (found.squared * own.voxel_weight).sum(dim=(1, 2))
        rows["set"] = torch.full_like(batch.sample_seed, self.names.index(own.name))
        rows["sample_seed"] = batch.sample_seed
        if self.sentinels is not None:
            rows |= sampled(found.encoded, self.sentinels.config.tokens_per_sample)
        return rows

    def by_set(self, predictions: dict[str, Tensor]) -> dict[str, tuple[Tensor, dict[str, Tensor]]]:
        """For each set that has any: which rows are its own, and those rows with the set's own region columns and the
        errors of the baselines on the same samples."""
        found = {}
        for index, name in enumerate(self.names):
            own = self.set_named(name)
            chosen = predictions["set"] == index
            if own.baselines is not None:
                chosen = own.scored_beside_baselines(chosen, predictions["sample_seed"])
            if bool(chosen.any()):
                rows = {key: values[chosen] for key, values in predictions.items()}
                rows |= {key: rows[key][:, : own.regions.num_columns] for key in ("error", "total", "count")}
                beside = {} if own.baselines is None else own.baselines.errors_of(rows["sample_seed"])
                found[name] = chosen, rows | {f"error_{baseline}": errors for baseline, errors in beside.items()}
        return found

    def metrics(self, predictions: dict[str, Tensor]) -> dict[str, float]:
        """loss and r2 with their parts, and those of the sentinels; of several sets <set>/r2 and so on, and the loss
        weighted as training is."""
        found = {}
        for name, (_, rows) in self.by_set(predictions).items():
            own = self.set_named(name)
            found[name] = {"loss": self.split_loss(name, rows)} | metrics_of(rows, own.regions)
            if self.sentinels is not None:
                found[name] |= self.sentinels.metrics(name, rows)
        if len(self.names) == 1:
            return found[self.names[0]]
        weights = {name: self.set_named(name).weight for name in found}
        whole = sum(weights[name] * values["loss"] for name, values in found.items()) / sum(weights.values())
        return {"loss": whole} | {f"{name}/{key}": value for name, each in found.items() for key, value in each.items()}

    def split_loss(self, name: str, rows: dict[str, Tensor]) -> float:
        """The loss of a set's rows of a split, as training counts it."""
        return float(rows["weighted"].double().sum() / (len(rows["weighted"]) * self.set_named(name).values_per_sample))

    def parameter_groups(self) -> list[ParameterGroup]:
        return split_decay(
            "model",
            [self.encoder, self.decoder],
            learning_rate_scale=1.0,
            weight_decay=self.weight_decay,
            opens_at=0,
        )

    def cost(self, batch: WindowBatch) -> Cost:
        shape = self.pass_shape(self.set_named(batch.set_name), rows=len(batch.weight))
        return Cost(tokens=shape.rows * shape.num_tokens, flops=flops_of_pass(self.config, shape))

    def pass_shape(self, own: MaskedSet, *, rows: int) -> PassShape:
        """What a forward pass on `rows` samples of a set holds."""
        num_hidden = own.masker.num_hidden
        num_features = self.encoder.stem(own.stem_name).num_features
        return PassShape(rows, own.masker.num_tokens - num_hidden, num_hidden, num_features)

    def checkpoint_activations(self) -> None:
        self.encoder.recomputes_activations = self.decoder.recomputes_activations = True

    def load_registered(self, folder: Path) -> None:
        """Take over a registered encoder's trunk, and its stems where the token shape is known; a new shape's stem is
        one of theirs resampled, of the same kind if there is one. The decoder starts from scratch."""
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

    def is_hidden(self, batch: WindowBatch) -> Bool[Tensor, "batch tubelet patch"]:
        """True for the tokens that this batch hides."""
        own = self.set_named(batch.set_name)
        return own.is_hidden(own.masker.choose(batch.sample_seed))

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


def take_tokens(
    tokens: Float[Tensor, "batch token feature"], chosen: Int64[Tensor, "batch chosen"]
) -> Float[Tensor, "batch chosen feature"]:
    """The chosen tokens of each sample; whole rows are copied, three times as fast as torch.gather on a CPU."""
    first_row = torch.arange(len(tokens), device=tokens.device)[:, None] * tokens.shape[1]
    rows = rearrange(tokens, "batch token feature -> (batch token) feature")
    return rows.index_select(0, (chosen + first_row).flatten()).view(*chosen.shape, tokens.shape[2])


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
