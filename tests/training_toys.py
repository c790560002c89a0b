"""A task, a source and a configuration small enough to train in milliseconds."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from configs.parse import FREE
from training.collectives import this_process
from training.config import (
    CheckpointConfig,
    EngineConfig,
    EvaluationConfig,
    OptimizerConfig,
    ProfileConfig,
    RunConfig,
    ScheduleConfig,
    SpikeConfig,
    StartConfig,
    TrackingConfig,
    TrainConfig,
)
from training.loop import Services
from training.task import Cost, ParameterGroup, State, Task
from training.unfreezing import UnfreezingConfig, layer_groups, split_decay
from training.whole_step import encoded_in_chunks, gathered, share_of_rank, symmetric_info_nce

GLOBAL_BATCH = 8
NUM_FEATURES = 6
PAIR_SIDES = ("left", "right")


@dataclass
class ToyBatch:
    features: Tensor  # [batch feature]
    targets: Tensor  # [batch]
    weight: Tensor
    scan_ids: list[str]

    def to(self, device: torch.device) -> ToyBatch:
        return ToyBatch(self.features.to(device), self.targets.to(device), self.weight.to(device), self.scan_ids)


def sample(index: int) -> tuple[Tensor, float]:
    features = torch.randn(NUM_FEATURES, generator=torch.Generator().manual_seed(index))
    return features, float(features.sum().sin())


def toy_batch(indices: list[int], size: int) -> ToyBatch:
    """The samples, padded with weight 0 to `size` rows."""
    rows = [sample(index) for index in indices]
    rows += [(torch.full((NUM_FEATURES,), 1e3), 1e3)] * (size - len(rows))
    return ToyBatch(
        torch.stack([features for features, _ in rows]),
        torch.tensor([target for _, target in rows]),
        torch.tensor([1.0] * len(indices) + [0.0] * (size - len(indices))),
        [f"scan-{index:04d}" for index in indices] + ["padding"] * (size - len(indices)),
    )


@dataclass
class PairBatch:
    """Two sides of each sample, nested as batches of several kinds are."""

    sides: dict[str, Tensor]  # of each name [batch feature]
    subject: Tensor
    weight: Tensor
    scan_ids: list[str]

    def to(self, device: torch.device) -> PairBatch:
        sides = {name: side.to(device) for name, side in self.sides.items()}
        return PairBatch(sides, self.subject.to(device), self.weight.to(device), self.scan_ids)


def pair_batch(indices: list[int], size: int) -> PairBatch:
    """The samples' features beside a turned copy of them, padded with weight 0 to `size` rows; six subjects in turn, so
    that a step holds some twice."""
    batch = toy_batch(indices, size)
    sides = {"left": batch.features, "right": batch.features.flip(1).sin()}
    subject = torch.tensor([index % 6 for index in indices] + [0] * (size - len(indices)))
    return PairBatch(sides, subject, batch.weight, batch.scan_ids)


class ToySource:
    """Samples 0, 1, 2 ... in order; step s is samples [8s, 8s + 8)."""

    def __init__(
        self,
        *,
        num_micro_batches: int = 2,
        num_validation: int = 13,
        make_batch: Callable[[list[int], int], Any] = toy_batch,
    ) -> None:
        self.make_batch = make_batch
        self.fingerprint = hashlib.sha256(b"toy").hexdigest()
        self.num_micro_batches = num_micro_batches
        self.num_validation = num_validation

    def initial_state(self) -> State:
        return {"samples_consumed": 0}

    def steps(self, state: State) -> Iterator[tuple[list[Any], State]]:
        consumed = int(str(state["samples_consumed"]))
        while True:
            mine = list(range(consumed, consumed + GLOBAL_BATCH))[this_process().rank :: this_process().world_size]
            size = -(-len(mine) // self.num_micro_batches)
            parts = [mine[size * part : size * (part + 1)] for part in range(self.num_micro_batches)]
            consumed += GLOBAL_BATCH
            yield [self.make_batch(part, size + 1) for part in parts], {"samples_consumed": consumed}

    def merge_states(self, states: list[State]) -> State:
        assert all(state == states[0] for state in states)
        return states[0]

    def evaluation(self, split: str, *, limit: int | None) -> Iterator[Any]:
        mine = [10_000 + index for index in range(limit or self.num_validation)][
            this_process().rank :: this_process().world_size
        ]
        for first in range(0, len(mine), 4):
            yield self.make_batch(mine[first : first + 4], 4)

    def close(self) -> None:
        return


class ToyTask(Task):
    def __init__(self, *, encoder_opens_at: int = 0, seed: int = 7, width: int = 12) -> None:
        super().__init__()
        generator_state = torch.random.get_rng_state()
        torch.manual_seed(seed)
        self.encoder = nn.Sequential(
            nn.Linear(NUM_FEATURES, width), nn.LayerNorm(width), nn.GELU(), nn.Linear(width, width)
        )
        self.head = nn.Linear(width, 1)
        self.offset = nn.Parameter(torch.zeros(1))
        torch.random.set_rng_state(generator_state)
        self.encoder_opens_at = encoder_opens_at
        self.poisoned_scan: str | None = None  # its loss is not finite
        self.heavy_scan: str | None = None  # its loss is far above the others'

    def outputs(self, batch: ToyBatch) -> Tensor:
        return self.head(self.encoder(batch.features))[:, 0].float() + self.offset

    def forward(self, batch: ToyBatch) -> dict[str, Tensor]:  # type: ignore[override]
        squared = (self.outputs(batch) - batch.targets).square() * batch.weight
        loss = squared.sum() / GLOBAL_BATCH
        if self.poisoned_scan is not None and self.poisoned_scan in batch.scan_ids:
            loss = loss + torch.tensor(float("inf"))
        if self.heavy_scan is not None and self.heavy_scan in batch.scan_ids:
            loss = loss + 1e3
        return {"loss": loss, "num_samples": batch.weight.sum()}

    def predict(self, batch: ToyBatch) -> dict[str, Tensor]:  # type: ignore[override]
        return {"squared_error": (self.outputs(batch) - batch.targets).square()}

    def metrics(self, predictions: dict[str, Tensor]) -> dict[str, float]:
        return {
            "loss": float(predictions["squared_error"].mean()),
            "num_samples": float(len(predictions["squared_error"])),
        }

    def parameter_groups(self) -> list[ParameterGroup]:
        return [
            *split_decay(
                "encoder",
                [self.encoder],
                learning_rate_scale=0.5,
                weight_decay=0.1,
                opens_at=self.encoder_opens_at,
            ),
            *split_decay("head", [self.head, self.offset], learning_rate_scale=1.0, weight_decay=0.1, opens_at=0),
        ]

    def cost(self, batch: ToyBatch) -> Cost:  # type: ignore[override]
        matrices = sum(parameter.numel() for parameter in self.parameters() if parameter.ndim == 2)
        return Cost(tokens=len(batch.features), flops=6.0 * len(batch.features) * matrices)


class ToyLayers(ToyTask):
    """The toy with an encoder of three layers, each with dropout, which open from the top."""

    def __init__(self, unfreezing: UnfreezingConfig, *, seed: int = 7) -> None:
        super().__init__(seed=seed)
        self.unfreezing = unfreezing
        generator_state = torch.random.get_rng_state()
        torch.manual_seed(seed)
        widths = [NUM_FEATURES, 12, 12, 12]
        self.encoder = nn.Sequential(
            *(
                nn.Sequential(nn.Linear(before, after), nn.Tanh(), nn.Dropout(0.2))
                for before, after in itertools.pairwise(widths)
            )
        )
        torch.random.set_rng_state(generator_state)

    def parameter_groups(self) -> list[ParameterGroup]:
        layers = [(str(index), [layer]) for index, layer in enumerate(self.encoder)][::-1]
        head = split_decay("head", [self.head, self.offset], learning_rate_scale=1.0, weight_decay=0.1, opens_at=0)
        return [*head, *layer_groups("encoder", layers, self.unfreezing, weight_decay=0.1)]


class ToyPairs(Task):
    """Two encoders and a learned temperature: which left belongs to which right, among all rows of the step."""

    needs_whole_step = True

    def __init__(self, *, right_opens_at: int = 0, seed: int = 7) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.encoders = nn.ModuleDict(
            {side: nn.Sequential(nn.Linear(NUM_FEATURES, 12), nn.GELU(), nn.Linear(12, 4)) for side in PAIR_SIDES}
        )
        with torch.no_grad():
            for parameter in self.encoders.parameters():
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
        self.temperature = nn.Parameter(torch.full((1,), 0.5))
        self.right_opens_at = right_opens_at

    def embedded(self, batch: PairBatch) -> list[Tensor]:
        encoders = [self.encoders[side] for side in PAIR_SIDES]
        values = [batch.sides[side] for side in PAIR_SIDES]
        return [
            encoded_in_chunks(encoder, rows, rows_per_chunk=2) for encoder, rows in zip(encoders, values, strict=True)
        ]

    def forward(self, batch: PairBatch) -> dict[str, Tensor]:  # type: ignore[override]
        left, right = (gathered(rows) for rows in self.embedded(batch))
        subjects = gathered(batch.subject)
        loss = symmetric_info_nce(left, right, gathered(batch.weight), temperature=self.temperature, groups=subjects)
        return {"loss": share_of_rank(loss)}

    def predict(self, batch: PairBatch) -> dict[str, Tensor]:  # type: ignore[override]
        return dict(zip(PAIR_SIDES, self.embedded(batch), strict=True))

    def metrics(self, predictions: dict[str, Tensor]) -> dict[str, float]:
        left, right = (predictions[side] for side in PAIR_SIDES)
        loss = symmetric_info_nce(left, right, torch.ones(len(left)), temperature=torch.full((1,), 0.5))
        return {"loss": float(loss)}

    def parameter_groups(self) -> list[ParameterGroup]:
        opens_at = {"left": 0, "right": self.right_opens_at}
        sides = [
            group
            for side in PAIR_SIDES
            for group in split_decay(
                side,
                [self.encoders[side]],
                learning_rate_scale=1.0,
                weight_decay=0.1,
                opens_at=opens_at[side],
            )
        ]
        return [*sides, ParameterGroup("temperature", [self.temperature], 1.0, 0.0, 0)]

    def cost(self, batch: PairBatch) -> Cost:  # type: ignore[override]
        return Cost(tokens=len(batch.weight), flops=1.0)


ENGINES = {
    "plain": EngineConfig("plain", 0, "fp32", False, False),
    "zero0": EngineConfig("deepspeed", 0, "fp32", False, False),
    "zero1": EngineConfig("deepspeed", 1, "fp32", False, False),
    "zero2": EngineConfig("deepspeed", 2, "fp32", False, False),
    "zero3": EngineConfig("deepspeed", 3, "fp32", False, False),
}


@dataclass
class ToyConfig(TrainConfig):
    run: RunConfig = field(metadata=FREE)


def services(config: ToyConfig, export: Callable[[Task], None] | None = None) -> Services:
    return Services(config.run, {"train": config}, export)


def toy_config(
    folder: Path, *, engine: str = "plain", steps: int = 6, checkpoint_every: int = 100, keep_last: int = 2
) -> ToyConfig:
    return ToyConfig(
        steps=steps,
        seed=3,
        choose="last",
        run=RunConfig(
            name="toy", folder=str(folder / "run"), scratch=str(folder / "scratch"), verbose=False, command=None
        ),
        start=StartConfig(checkpoint=None, registered=None),
        optimizer=OptimizerConfig(kind="adamw", learning_rate=1e-2, betas=(0.9, 0.95), epsilon=1e-8, clip_norm=1.0),
        schedule=ScheduleConfig(kind="cosine", warmup_steps=2, final_share=0.1, plateau=None),
        engine=ENGINES[engine],
        checkpoint=CheckpointConfig(
            every_steps=checkpoint_every, keep_last=keep_last, keep_every_steps=None, best_metric=None, best_is="lowest"
        ),
        evaluation=EvaluationConfig(every_steps=100, split="validation", subset=8, final_splits=["validation"]),
        tracking=TrackingConfig(every_steps=1, uri=None, experiment="toy", group_norms=False, timeout_s=2, drain_s=20),
        spikes=SpikeConfig(window_steps=8, threshold=20.0),
        profile=ProfileConfig(start_step=2, num_steps=0),
        peak_tflops={},
    )
