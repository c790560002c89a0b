"""An encoder and a head over a whole run: what fine-tuning trains and a registered classifier serves."""

from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from brain_models.encoder import BrainEncoder
from brain_models.heads import Classifier


class RunClassifier(nn.Module):
    """Encodes a run window by window, as in pretraining, and pools all windows' tokens to one logit."""

    def __init__(self, encoder: BrainEncoder, head: Classifier, *, window_frames: int) -> None:
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
        num_windows = values.shape[1] // self.window_frames
        used = values[:, : num_windows * self.window_frames]
        encoded = self.encoder.encode_windows(
            rearrange(used, "batch (window frame) voxel -> (batch window) frame voxel", frame=self.window_frames),
            is_measured.repeat_interleave(num_windows, dim=0),
            repetition_time_s.repeat_interleave(num_windows, dim=0),
            "bold",
        )
        return rearrange(
            encoded,
            "(batch window) (tubelet patch) width -> batch (window tubelet) patch width",
            batch=len(values),
            patch=self.encoder.stem("bold").num_patches,
        )

    def forward(
        self,
        values: Float[Tensor, "batch time voxel"],
        is_measured: Bool[Tensor, "batch voxel"],
        repetition_time_s: Float[Tensor, "batch"],
    ) -> Float[Tensor, "batch"]:
        """Returns a logit a run, above 0 for the positive class."""
        return self.head(self.tokens(values, is_measured, repetition_time_s))
