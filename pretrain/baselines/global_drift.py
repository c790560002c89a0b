"""What the whole brain does at once and what drifts slowly, as a guess of hidden voxels. Arrays in, arrays out.

Knows visible values of the window it guesses, and weights a voxel learnt on the training split; no model and no file.
"""

import torch
from einops import einsum, rearrange, reduce, repeat
from jaxtyping import Bool, Float
from torch import Tensor

PENALTY = 1e-3  # of the two weights, as a share of a regressor's mean square: voxels hardly ever hidden stay near 0


class GlobalDrift:
    """guess(voxel, frame) = a(voxel) x global signal(frame) + b(voxel) x drift(patch of the voxel, frame).

    The global signal is the mean of all visible measured voxels of that frame. The drift is a polynomial in time over
    the window, fitted by least squares to what can be seen of or around the patch: the patch's own mean in frames that
    show it, the mean of its nearest visible patches in the others. Frames that show nothing (future masking) take no
    part in the fits; drift and global signal are continued there by their polynomials. a and b are least squares over
    the hidden values of the training samples, under their own masks. So a guess sees visible values of its own window
    and the training split, as the model does, and nothing else.

    Within a window of seconds the quadratic drift of a run is nearly a line, hence a degree of 1 unless configured.
    """

    def __init__(self, num_voxels: int, *, degree: int) -> None:
        self.degree = degree
        self.moments = torch.zeros(num_voxels, 2, 2, dtype=torch.float64)
        self.products = torch.zeros(num_voxels, 2, dtype=torch.float64)

    def regressors(
        self,
        means: Float[Tensor, "batch time patch"],
        neighbours: Float[Tensor, "batch time patch"],
        *,
        num_measured: Float[Tensor, "batch patch"],
        is_visible: Bool[Tensor, "batch tubelet patch"],
    ) -> tuple[Float[Tensor, "batch time"], Float[Tensor, "batch time patch"]]:
        """Global signal and drift of every window, from visible patch means and the neighbour baseline's guess."""
        frames = means.shape[1] // is_visible.shape[1]
        is_seen = repeat(is_visible, "batch tubelet patch -> batch (tubelet frame) patch", frame=frames)
        is_shown = is_seen.any(dim=2)
        voxels = is_seen * num_measured[:, None]
        signal = (means * voxels).sum(dim=2) / voxels.sum(dim=2).clamp(min=1)
        smooth = polynomial_smoother(is_shown, degree=self.degree).to(means.dtype)
        drift = einsum(
            smooth, torch.where(is_seen, means, neighbours), "batch time frame, batch frame patch -> batch time patch"
        )
        continued = einsum(smooth, signal, "batch time frame, batch frame -> batch time")
        return torch.where(is_shown, signal, continued), drift

    def add(
        self,
        signal: Float[Tensor, "batch time"],
        drift: Float[Tensor, "batch time voxel"],
        *,
        centred: Float[Tensor, "batch time voxel"],
        is_scored: Bool[Tensor, "batch time voxel"],
    ) -> None:
        """Learn from the hidden, measured values of training samples."""
        whole = rearrange(signal, "batch time -> batch time 1") * is_scored
        slow = drift * is_scored
        for row, column, product in ((0, 0, whole.square()), (0, 1, whole * slow), (1, 1, slow.square())):
            self.moments[:, row, column] += reduce(product, "batch time voxel -> voxel", "sum").double()
        self.moments[:, 1, 0] = self.moments[:, 0, 1]
        for row, product in ((0, whole * centred), (1, slow * centred)):
            self.products[:, row] += reduce(product, "batch time voxel -> voxel", "sum").double()

    def weights(self) -> Float[Tensor, "voxel 2"]:
        """a and b of every voxel; 0 where no training sample hid it."""
        diagonal = self.moments.diagonal(dim1=1, dim2=2)
        typical = diagonal.mean(dim=0).clamp(min=1e-12)
        return torch.linalg.solve(self.moments + torch.diag(PENALTY * typical), self.products).float()

    def predict(
        self, signal: Float[Tensor, "batch time"], drift: Float[Tensor, "batch time voxel"]
    ) -> Float[Tensor, "batch time voxel"]:
        """The guess for every voxel."""
        by_signal, by_drift = self.weights().T
        return rearrange(signal, "batch time -> batch time 1") * by_signal + drift * by_drift


def polynomial_smoother(is_shown: Bool[Tensor, "batch time"], *, degree: int) -> Float[Tensor, "batch time frame"]:
    """The matrix from a window's frames to the values of the polynomial that fits its shown frames best.

    With fewer shown frames than coefficients, the smallest coefficients that fit.
    """
    time = torch.linspace(-1, 1, is_shown.shape[1], dtype=torch.float64, device=is_shown.device)
    powers = torch.stack([time**power for power in range(degree + 1)], dim=1)
    shown = is_shown.double()
    return powers @ (torch.linalg.pinv(shown[:, :, None] * powers) * shown[:, None])
