"""What each rule and group of regions can reach on a layout: the numbers a budget has to respect. Pure functions."""

from typing import get_args

from jaxtyping import Float
from torch import Tensor

from pretrain.masked.geometry import Geometry
from pretrain.masked.masking import Rule, columns_of_groups, reachable

WHOLE = "brain"


def reach_of_groups(shares: Float[Tensor, "patch region"], geometry: Geometry) -> dict[Rule, dict[str, float]]:
    """The share of all patches that region masking can hide, by rule and group; 'brain': without naming a group.

    `shares` are the geometry's own membership, pseudo-regions of unlabelled tissue included.
    """
    region_ids = geometry.atlas.membership(geometry.layout, geometry.space).region_ids.tolist()
    groups = geometry.atlas.groups
    columns = {name: columns_of_groups([name], "groups", atlas_groups=groups, region_ids=region_ids) for name in groups}
    return {
        rule: {
            name: float(reachable(shares, rule, allowed).float().mean())
            for name, allowed in {WHOLE: None, **columns}.items()
        }
        for rule in get_args(Rule)
    }
