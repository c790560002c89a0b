"""Aligning two towers: each row's T1 and fMRI, among all rows of the step. Knows batches; nothing of files or ranks."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from brain_models.inputs import StemSpec
from brain_models.series_networks import SeriesConfig, connectivity
from brain_models.towers import Tower
from data_sharding.read.batch import PairedBatch, WindowBatch
from finetune.tasks.contrastive_alignment.augmentation import augment_series, augment_t1, generators_of
from finetune.tasks.contrastive_alignment.config import FUNCTION, STRUCTURE, Config
from finetune.tasks.contrastive_alignment.losses import Temperature, alignment_losses
from finetune.tasks.contrastive_alignment.retrieval import METRICS, Similarities, geometry, similarities
from training.task import Cost, ParameterGroup, Task
from training.unfreezing import layer_groups, split_decay
from training.whole_step import encoded_in_chunks, gathered, share_of_rank

SIDES = (STRUCTURE, FUNCTION)


class ContrastiveAlignment(Task):
    """Two towers and a temperature; metrics are by subject, over a whole split."""

    needs_whole_step = True

    positions_mm: Float[Tensor, "voxel 3"]  # of the T1s
    patch_of_voxel: Int[Tensor, "voxel"]
    voxels_per_patch: Int[Tensor, "patch"]

    def __init__(
        self,
        structure: Tower,
        function: Tower,
        config: Config,
        *,
        subjects: list[str],
        stem: StemSpec,
    ) -> None:
        super().__init__()
        self.register_buffer("positions_mm", torch.from_numpy(stem.space.positions_mm), persistent=False)
        self.register_buffer("patch_of_voxel", torch.from_numpy(stem.layout.patch_of_voxel).long(), persistent=False)
        self.register_buffer("voxels_per_patch", torch.from_numpy(stem.layout.voxels_per_patch), persistent=False)
        self.towers = nn.ModuleDict({STRUCTURE: structure, FUNCTION: function})
        self.temperature = Temperature(config.loss)
        self.config = config
        self.subjects = subjects
        self.number_of_subject = {subject: number for number, subject in enumerate(subjects)}

    def forward(self, batch: PairedBatch) -> dict[str, Tensor]:
        """The loss over all rows of the step with its two levels, this rank's share of them."""
        first, second = (gathered(rows) for rows in self.embedded(batch))
        losses = alignment_losses(
            first,
            second,
            gathered(batch.weight),
            subjects=gathered(self.numbers(batch)),
            temperature=self.temperature(),
            kind=self.config.loss.kind,
        )
        return {name: share_of_rank(value) for name, value in losses.items()}

    def embedded(self, batch: PairedBatch) -> tuple[Float[Tensor, "batch width"], Float[Tensor, "batch width"]]:
        """The embeddings of both sides, computed a few rows at a time."""
        columns = {side: self.columns(batch, side) for side in SIDES}
        first, second = (
            encoded_in_chunks(self.towers[side], *columns[side], rows_per_chunk=self.config.rows_per_chunk).float()
            for side in SIDES
        )
        return first, second

    def columns(self, batch: PairedBatch, side: str) -> tuple[Tensor, ...]:
        """What the tower of a side reads of its windows, augmented in training."""
        windows = batch.sides[side]
        if side == STRUCTURE:
            return self.augmented_t1(windows), windows.is_measured
        if isinstance(self.config.function.network, SeriesConfig):
            return *self.augmented_series(windows), windows.repetition_time_s
        return windows.values, windows.is_measured, windows.repetition_time_s

    def augmented_t1(self, windows: WindowBatch) -> Float[Tensor, "batch 1 voxel"]:
        """The T1s of a batch; in training, changed as their samples' seeds say."""
        config = self.config.structure.augmentation
        if config is None or not self.training:
            return windows.values
        generators = generators_of(windows.sample_seed, windows.values.device)
        return augment_t1(windows.values, windows.is_measured, self.positions_mm, generators=generators, config=config)

    def augmented_series(self, windows: WindowBatch) -> tuple[Tensor, Tensor]:
        """The series of a batch and which frames are real; in training, changed as their samples' seeds say."""
        config = self.config.function.augmentation
        if config is None or not self.training:
            return windows.values, windows.is_frame
        generators = generators_of(windows.sample_seed, windows.values.device)
        return augment_series(windows.values, windows.is_frame, generators=generators, config=config)

    @torch.compiler.disable  # names looked up in a dict: compiled, it would be compiled anew for every batch
    def numbers(self, batch: PairedBatch) -> Int[Tensor, "batch"]:
        """The number of each row's subject."""
        numbers = torch.tensor([self.number_of_subject[subject] for subject in batch.subjects])
        is_cuda = batch.weight.is_cuda
        return (numbers.pin_memory() if is_cuda else numbers).to(batch.weight.device, non_blocking=True)

    def predict(self, batch: PairedBatch) -> dict[str, Tensor]:
        """The embeddings of both sides, `subject`, its number, and what connectivity is predicted from and scored by:
        `patches`, the T1's mean in each patch, and of region series `edges`, Fisher's z of all pairs of regions."""
        found = {**dict(zip(SIDES, self.embedded(batch), strict=True)), "subject": self.numbers(batch)}
        t1, run = batch.sides[STRUCTURE], batch.sides[FUNCTION]
        sums = t1.values.new_zeros(len(t1.values), len(self.voxels_per_patch))
        found["patches"] = sums.index_add(1, self.patch_of_voxel, t1.values[:, 0]) / self.voxels_per_patch
        if self.config.function.network is not None:
            pairs = torch.triu_indices(run.values.shape[2], run.values.shape[2], offset=1, device=run.values.device)
            found["edges"] = connectivity(run.values, run.is_frame)[:, pairs[0], pairs[1]]
        return found

    def similarities(self, predictions: dict[str, Tensor]) -> Similarities:
        """The cosines of all subjects of a split."""
        subjects = tuple(self.subjects[number] for number in predictions["subject"].tolist())
        return similarities(subjects, *(predictions[side].numpy() for side in SIDES))

    def metrics(self, predictions: dict[str, Tensor]) -> dict[str, float]:
        """The loss of the split as one batch with its levels, METRICS, and how the embeddings lie."""
        first, second = (predictions[side] for side in SIDES)
        losses = alignment_losses(
            first,
            second,
            torch.ones(len(first)),
            subjects=predictions["subject"],
            temperature=self.temperature().detach().cpu(),
            kind=self.config.loss.kind,
        )
        found = self.similarities(predictions)
        numbers = {metric.name: metric.value(found) for metric in METRICS}
        numbers |= {name: float(value) for name, value in losses.items()}
        numbers |= geometry(first.numpy(), second.numpy())
        return {name: value for name, value in numbers.items() if math.isfinite(value)}

    def parameter_groups(self) -> list[ParameterGroup]:
        """Heads and temperature, open from the start, and the layers of each side's network, from the top."""
        decay = self.config.weight_decay
        groups = []
        for side, unfreezing in (
            (STRUCTURE, self.config.structure.unfreezing),
            (FUNCTION, self.config.function.unfreezing),
        ):
            tower = self.towers[side]
            assert isinstance(tower, Tower)
            name = f"{side}.projection"
            groups += split_decay(name, [tower.projection], learning_rate_scale=1.0, weight_decay=decay, opens_at=0)
            groups += layer_groups(side, tower.network.layers(), unfreezing, weight_decay=decay)
        learned = list(self.temperature.parameters())
        return [*groups, *([ParameterGroup("temperature", learned, 1.0, 0.0, 0)] if learned else [])]

    def cost(self, batch: PairedBatch) -> Cost:
        """Every matrix of a tower once per token; attention scores are left out."""
        tokens, flops = 0, 0.0
        for side in SIDES:
            tower = self.towers[side]
            assert isinstance(tower, Tower)
            of_row = tower.network.num_tokens(batch.sides[side].frames().shape[1])
            matrices = sum(parameter.numel() for parameter in tower.network.parameters() if parameter.ndim >= 2)
            passes = 3 if any(parameter.requires_grad for parameter in tower.network.parameters()) else 1
            tokens += len(batch.weight) * of_row
            flops += 2.0 * passes * len(batch.weight) * of_row * matrices
        return Cost(tokens=tokens, flops=flops)
