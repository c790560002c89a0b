"""The model kinds "run_classifier" and "run_regressor": an encoder and a head over a whole run."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from brain_models.embedding import make_encoder
from brain_models.encoder import BrainEncoder, EncoderConfig, StemName
from brain_models.heads import HeadConfig, RunHead
from brain_models.inputs import (
    Column,
    Row,
    ScanInput,
    Stems,
    StemSpec,
    columns_of,
    example_scan,
    read_scan,
    require_frames,
)


@dataclass
class RunPredictorConfig:
    """An encoder and a head over segments of `segment_frames`; a run's output is the mean of its segments'."""

    encoder: EncoderConfig
    head: HeadConfig
    segment_frames: int


@dataclass
class RunClassifierConfig(RunPredictorConfig):
    """The output is the logit of `positive`; from the probability `threshold` on, a run is called positive."""

    positive: str
    negative: str
    threshold: float


@dataclass
class RunRegressorConfig(RunPredictorConfig):
    """The output is a standardised value; what is predicted is mean + scale * output, in the unit of `value`."""

    value: str  # the column of the subject table it was trained on
    mean: float
    scale: float


class RunPredictor(nn.Module):
    """Encodes a run window by window, as in pretraining, and pools all windows' tokens to one number."""

    def __init__(self, encoder: BrainEncoder, head: RunHead, *, window_frames: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.window_frames = window_frames

    def tokens(
        self,
        values: Float[Tensor, "batch time voxel"],
        is_measured: Bool[Tensor, "batch voxel"],
        repetition_time_s: Float[Tensor, "batch"],
    ) -> Float[Tensor, "batch window patch width"]:
        """Returns all tokens in order of time; the tubelets of a window follow one another on the window axis."""
        return run_tokens(self.encoder, values, is_measured, repetition_time_s, window_frames=self.window_frames)

    def forward(
        self,
        values: Float[Tensor, "batch time voxel"],
        is_measured: Bool[Tensor, "batch voxel"],
        repetition_time_s: Float[Tensor, "batch"],
    ) -> Float[Tensor, "batch"]:
        """Returns one number per run: a logit, or a standardised value."""
        return self.head(self.tokens(values, is_measured, repetition_time_s))


def run_tokens(
    encoder: BrainEncoder,
    values: Float[Tensor, "batch time voxel"],
    is_measured: Bool[Tensor, "batch voxel"],
    repetition_time_s: Float[Tensor, "batch"],
    *,
    window_frames: int,
) -> Float[Tensor, "batch window patch width"]:
    """Returns all tokens of a run's whole windows in order of time, tubelets on the window axis."""
    num_windows = values.shape[1] // window_frames
    encoded = encoder.encode_windows(
        rearrange(
            values[:, : num_windows * window_frames],
            "batch (window frame) voxel -> (batch window) frame voxel",
            frame=window_frames,
        ),
        is_measured.repeat_interleave(num_windows, dim=0),
        repetition_time_s.repeat_interleave(num_windows, dim=0),
        "bold",
    )
    return rearrange(
        encoded,
        "(batch window) (tubelet patch) width -> batch (window tubelet) patch width",
        batch=len(values),
        patch=encoder.stem("bold").num_patches,
    )


def run_predictor(encoder: BrainEncoder, stem: StemSpec, config: HeadConfig) -> RunPredictor:
    """Returns the encoder under a fresh head, which pools over the named regions of the stem's atlas."""
    membership = None
    if stem.atlas is not None and stem.atlas.region_ids:
        regions = stem.atlas.membership(stem.layout, stem.space)
        membership = torch.from_numpy(regions.shares[:, regions.is_named])
    head = RunHead(config, encoder.config.width, membership=membership)
    return RunPredictor(encoder, head, window_frames=stem.window_frames)


def build(config: RunPredictorConfig, stems: Stems) -> RunPredictor:
    """Returns a fresh encoder under a fresh head."""
    return run_predictor(make_encoder(config.encoder, stems), stems["bold"], config.head)


def examples(config: RunPredictorConfig, stems: Stems, seed: int) -> Iterator[ScanInput]:
    """Yields one segment."""
    yield example_scan("bold", stems["bold"], num_frames=config.segment_frames, seed=seed)


def columns(stems: Collection[StemName]) -> dict[str, Column]:
    """Returns the columns of a run."""
    return columns_of(["bold"])


def read(row: Row, config: RunPredictorConfig, stems: Stems) -> ScanInput:
    """Returns a run of at least one segment."""
    return require_frames(read_scan(row, {"bold": stems["bold"]}), config.segment_frames)


def compute(model: RunPredictor, config: RunPredictorConfig, scan: ScanInput) -> Float[Tensor, "1 1"]:
    """Returns the mean output of the run's whole segments."""
    num_frames = config.segment_frames
    starts = range(0, scan.values.shape[1] - num_frames + 1, num_frames)
    segments = [scan.values[:, first : first + num_frames] for first in starts]
    outputs = [model(segment, scan.is_measured, scan.repetition_time_s) for segment in segments]
    return torch.stack(outputs).mean().reshape(1, 1)


def answer_class(config: RunClassifierConfig, outputs: Float[Tensor, "row 1"]) -> dict[str, np.ndarray]:
    """Returns `prediction`, the name of a class, and `probability_of_<class>` of both."""
    probability = torch.sigmoid(outputs[:, 0]).double().numpy()
    return {
        "prediction": np.where(probability >= config.threshold, config.positive, config.negative),
        f"probability_of_{config.negative}": 1 - probability,
        f"probability_of_{config.positive}": probability,
    }


def answer_value(config: RunRegressorConfig, outputs: Float[Tensor, "row 1"]) -> dict[str, np.ndarray]:
    """Returns `prediction`, in the unit of the value that was learned."""
    return {"prediction": config.mean + config.scale * outputs[:, 0].double().numpy()}
