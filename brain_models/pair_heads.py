"""Heads that say how dissimilar two images are, from the features of both.

All but the concatenation, the baseline that a study used, are symmetric by construction: d(a, b) = d(b, a). The two
distance heads are also least where a = b.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

PAIRS_AT_ONCE = 1 << 14
TINY = 1e-6  # under a root, whose slope at 0 is infinite
TWICE_UNIT_VARIANCE = 2.0  # the expected squared difference of two standardised features


@dataclass
class PairHeadConfig:
    """`projection`: the distance of learned projections; `weighted`: a distance with one weight per feature; `mlp`: of
    |a - b| and a*b; `concatenation`: an MLP of a beside b, which is not symmetric."""

    kind: Literal["projection", "weighted", "mlp", "concatenation"]
    width: int  # of the projection, or of hidden layers
    num_hidden: int  # layers of mlp and concatenation, 0 to 3
    dropout: float
    distance: Literal["pearson", "euclidean"]  # of projections
    output: Literal["linear", "sigmoid"]  # sigmoid: 2 x sigmoid, the range of 1 - Pearson


class PairHead(nn.Module):
    """Dissimilarities of pairs. Features are standardised by `mean` and `scale`; a linear output starts at `centre`,
    in units of `spread`: buffers that are set once, from training images and their pairs."""

    is_symmetric = True
    mean: Float[Tensor, "feature"]
    scale: Float[Tensor, "feature"]
    centre: Float[Tensor, "1"]
    spread: Float[Tensor, "1"]

    def __init__(self, num_features: int, config: PairHeadConfig) -> None:
        super().__init__()
        self.output = config.output
        for name, size, value in (
            ("mean", num_features, 0.0),
            ("scale", num_features, 1.0),
            ("centre", 1, 0.0),
            ("spread", 1, 1.0),
        ):
            self.register_buffer(name, torch.full((size,), value))

    def standardise(
        self,
        features: Float[Tensor, "image feature"],
        dissimilarities: Float[Tensor, "pair"],
    ) -> None:
        """Sets the buffers from the features of the training images and the dissimilarities of their pairs."""
        self.mean.copy_(features.mean(dim=0))
        scale = features.std(dim=0)
        self.scale.copy_(torch.where(scale > TINY, scale, torch.ones_like(scale)))
        self.centre.copy_(dissimilarities.mean())
        self.spread.copy_(dissimilarities.std().clamp(min=TINY))

    def embed(self, features: Float[Tensor, "image feature"]) -> Float[Tensor, "image width"]:
        """Returns what of an image enters its pairs."""
        return (features - self.mean) / self.scale

    def forward(self, first: Float[Tensor, "pair width"], second: Float[Tensor, "pair width"]) -> Float[Tensor, "pair"]:
        """Returns the dissimilarities of pairs of embedded images."""
        raw = self.raw(first, second)
        return 2 * torch.sigmoid(raw) if self.output == "sigmoid" else self.centre + self.spread * raw

    def raw(self, first: Float[Tensor, "pair width"], second: Float[Tensor, "pair width"]) -> Float[Tensor, "pair"]:
        raise NotImplementedError

    @torch.no_grad()
    def matrix(self, embedded: Float[Tensor, "image width"]) -> Float[Tensor, "image image"]:
        """Returns the dissimilarities of all images, row's first; zero on the diagonal.

        A symmetric head is asked about one triangle.
        """
        num_images = len(embedded)
        matrix = torch.zeros(num_images, num_images)
        rows_at_once = max(1, PAIRS_AT_ONCE // num_images)
        for start in range(0, num_images, rows_at_once):
            rows = torch.arange(start, min(start + rows_at_once, num_images))
            columns = torch.arange(start if self.is_symmetric else 0, num_images)
            row, column = (each.reshape(-1) for each in torch.meshgrid(rows, columns, indexing="ij"))
            found = self(embedded[row], embedded[column]).float().cpu()
            matrix[row, column] = found
            if self.is_symmetric:
                matrix[column, row] = found
        return matrix.fill_diagonal_(0)


class _Distance(PairHead):
    """A distance, scaled by a positive slope; it starts about 0 for features that differ as unrelated ones do."""

    usual = TWICE_UNIT_VARIANCE**0.5

    def __init__(self, num_features: int, config: PairHeadConfig) -> None:
        super().__init__(num_features, config)
        self.slope = nn.Parameter(torch.zeros(1))
        self.offset = nn.Parameter(torch.zeros(1))

    def raw(self, first: Float[Tensor, "pair width"], second: Float[Tensor, "pair width"]) -> Float[Tensor, "pair"]:
        return self.slope.exp() * (self.distance(first, second) - self.usual) + self.offset

    def distance(
        self, first: Float[Tensor, "pair width"], second: Float[Tensor, "pair width"]
    ) -> Float[Tensor, "pair"]:
        return (self.weighted((first - second).square()).mean(dim=1) + TINY).sqrt()

    def weighted(self, squares: Float[Tensor, "pair width"]) -> Float[Tensor, "pair width"]:
        return squares

    def fit_line(self, features: Float[Tensor, "image feature"], true: Float[Tensor, "image image"]) -> None:
        """Sets slope and offset to the line through the dissimilarities of these images that fits best, rising."""
        embedded = self.embed(features)
        row, column = torch.triu_indices(len(features), len(features), offset=1)
        with torch.no_grad():
            found = self.distance(embedded[row], embedded[column]) - self.usual
            wanted = (true[row, column] - self.centre) / self.spread
            slope = torch.cov(torch.stack([found, wanted]))[0, 1] / found.var()
            self.slope.copy_(slope.clamp(min=TINY).log())
            self.offset.copy_(wanted.mean() - slope.clamp(min=TINY) * found.mean())


class ProjectionHead(_Distance):
    """The distance of learned projections, which start as random ones: distances are then those of the features. With
    `distance` pearson it is 1 - their cosine."""

    def __init__(self, num_features: int, config: PairHeadConfig) -> None:
        super().__init__(num_features, config)
        self.project = nn.Linear(num_features, config.width, bias=False)
        self.is_cosine = config.distance == "pearson"
        self.usual = 1.0 if self.is_cosine else self.usual
        nn.init.normal_(self.project.weight, std=num_features**-0.5)

    def embed(self, features: Float[Tensor, "image feature"]) -> Float[Tensor, "image width"]:
        return self.project(super().embed(features))

    def distance(
        self, first: Float[Tensor, "pair width"], second: Float[Tensor, "pair width"]
    ) -> Float[Tensor, "pair"]:
        return 1 - functional.cosine_similarity(first, second) if self.is_cosine else super().distance(first, second)

    def start_from(self, weights: Float[Tensor, "feature vertex"]) -> None:
        """Sets the projection so that distances of projections are those of the patterns that these weights predict
        from standardised features, exactly if the width is no less than the features."""
        about = weights - weights.mean(dim=1, keepdim=True) if self.is_cosine else weights / weights.shape[1] ** 0.5
        left, sizes, _ = torch.linalg.svd(about, full_matrices=False)
        kept = min(len(self.project.weight), len(sizes))
        with torch.no_grad():
            self.project.weight.zero_()
            self.project.weight[:kept] = (left * sizes).T[:kept]
            if not self.is_cosine:  # whose distance is a mean over the width
                self.project.weight.mul_(len(self.project.weight) ** 0.5)


class WeightedHead(_Distance):
    """A distance with a weight for every feature, all equal at the start and never negative."""

    def __init__(self, num_features: int, config: PairHeadConfig) -> None:
        super().__init__(num_features, config)
        self.weight = nn.Parameter(torch.zeros(num_features))

    def weighted(self, squares: Float[Tensor, "pair width"]) -> Float[Tensor, "pair width"]:
        return squares * self.weight.exp()


class MlpHead(PairHead):
    """An MLP of |a - b| and a*b, which are the same for (b, a); it starts at the mean dissimilarity."""

    def __init__(self, num_features: int, config: PairHeadConfig) -> None:
        super().__init__(num_features, config)
        widths = [2 * num_features] + [config.width] * config.num_hidden
        layers: list[nn.Module] = []
        for wide, narrow in pairwise(widths):
            layers += [nn.Linear(wide, narrow), nn.GELU(), nn.Dropout(config.dropout)]
        last = nn.Linear(widths[-1], 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(*layers, last)

    def raw(self, first: Float[Tensor, "pair width"], second: Float[Tensor, "pair width"]) -> Float[Tensor, "pair"]:
        return self.layers(self.joined(first, second))[:, 0]

    def joined(
        self, first: Float[Tensor, "pair width"], second: Float[Tensor, "pair width"]
    ) -> Float[Tensor, "pair joined"]:
        return torch.cat([(first - second).abs(), first * second], dim=1)


class ConcatenationHead(MlpHead):
    """An MLP of a beside b: not symmetric, so the order of a pair changes what it says."""

    is_symmetric = False

    def joined(
        self, first: Float[Tensor, "pair width"], second: Float[Tensor, "pair width"]
    ) -> Float[Tensor, "pair joined"]:
        return torch.cat([first, second], dim=1)


HEADS = {
    "projection": ProjectionHead,
    "weighted": WeightedHead,
    "mlp": MlpHead,
    "concatenation": ConcatenationHead,
}


def make_head(num_features: int, config: PairHeadConfig) -> PairHead:
    """Returns a fresh head for features of this width."""
    return HEADS[config.kind](num_features, config)
