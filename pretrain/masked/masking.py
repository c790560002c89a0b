"""Which tokens a sample hides: every token gets a sort key, and the lowest keys are hidden up to an exact budget.

Pure functions of each sample's seed; knows layouts and atlases only as arrays, and nothing of models or data.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from data_sharding.hashing import GOLDEN_GAMMA, splitmix64
from pretrain.errors import MaskingError

StrategyName = Literal["random", "tube", "future", "region"]
Rule = Literal["majority", "any", "pure"]

_NEVER = torch.iinfo(torch.int64).max
_FULL_SHARE = 1 - 1e-4  # membership is float32; patches hold at most a few thousand voxels


@dataclass
class MaskingConfig:
    kind: StrategyName
    hidden_share: float  # of all patches; the token budget is this many patches in every tubelet
    rule: Rule  # how a patch belongs to regions
    groups: list[str]  # hide only patches of these atlas groups; empty = the whole brain
    exclude: list[str]  # never hide patches of these atlas groups


@dataclass(frozen=True)
class Columns:
    """Membership columns of the regions that may be hidden (None = all), and of those that may not."""

    allowed: Sequence[int] | None
    excluded: Sequence[int]


@dataclass(frozen=True)
class TokenChoice:
    """Token indices of each sample, ascending; token = tubelet * num_patches + patch."""

    hidden: Int64[Tensor, "batch hidden"]
    visible: Int64[Tensor, "batch visible"]


def num_hidden_patches(hidden_share: float, num_patches: int) -> int:
    """The budget in patches; every strategy hides exactly this many tokens per tubelet on average."""
    return round(hidden_share * num_patches)


def stream_offsets(count: int, *, stream: int) -> Int64[Tensor, "count"]:
    """What `random_bits` adds to a seed at each position. Made once: compilers work such products out with numbers that
    do not wrap, and fail."""
    return (torch.arange(1, count + 1) + (stream << 40)) * GOLDEN_GAMMA


def random_bits(sample_seed: Int64[Tensor, "batch"], offsets: Int64[Tensor, "count"]) -> Int64[Tensor, "batch count"]:
    """Uniform integers in [0, 2^31), a hash of (seed, stream, position): no state, so no sample depends on another.

    The same numbers on CPU and GPU, without a host round trip.
    """
    return splitmix64(rearrange(splitmix64(sample_seed), "batch -> batch 1") + offsets) & 0x7FFFFFFF


def regions_of_patches(
    membership: Float[Tensor, "patch region"], rule: Rule, allowed: Sequence[int] | None
) -> Int64[Tensor, "patch choice"]:
    """The regions whose random number a patch may inherit, padded with num_regions.

    `allowed` are the region columns that may be hidden (None = all). majority: the patch's most frequent region (the
    first of equals); any: each region it touches; pure: its region, for patches wholly inside one.
    """
    num_regions = membership.shape[1]
    share, column = membership.max(dim=1)
    belongs = membership > 0
    if rule != "any":
        keeps = share > (_FULL_SHARE if rule == "pure" else 0)
        belongs = torch.zeros_like(belongs)
        belongs[keeps, column[keeps]] = True
    if allowed is not None:
        is_allowed = torch.zeros(num_regions, dtype=torch.bool)
        is_allowed[list(allowed)] = True
        belongs = belongs & is_allowed
    width = max(1, int(belongs.sum(dim=1).max()))
    columns = torch.where(belongs, torch.arange(num_regions), num_regions)
    return columns.sort(dim=1).values[:, :width]


def reachable(
    membership: Float[Tensor, "patch region"], rule: Rule, allowed: Sequence[int] | None
) -> Bool[Tensor, "patch"]:
    """True for the patches that a rule can hide, given the region columns it may hide."""
    return (regions_of_patches(membership, rule, allowed) < membership.shape[1]).any(dim=1)


def eligible_patches(
    membership: Float[Tensor, "patch region"], config: MaskingConfig, columns: Columns
) -> Bool[Tensor, "patch"]:
    """True for the patches that a masking configuration may hide.

    A patch is of a group when the rule gives it one of the group's regions: under `any` a patch that touches an
    excluded region is never hidden, under `majority` one that is mostly of it.
    """
    eligible = ~reachable(membership, config.rule, columns.excluded)
    if config.kind == "region" or columns.allowed is not None:
        eligible = eligible & reachable(membership, config.rule, columns.allowed)
    return eligible


def hidable_columns(
    config: MaskingConfig, *, atlas_groups: Mapping[str, Sequence[int]], region_ids: Sequence[int]
) -> Columns:
    """The membership columns that `groups` and `exclude` name; MaskingError for a group the atlas does not have."""
    allowed = columns_of_groups(config.groups, "groups", atlas_groups=atlas_groups, region_ids=region_ids)
    excluded = columns_of_groups(config.exclude, "exclude", atlas_groups=atlas_groups, region_ids=region_ids)
    return Columns(allowed if config.groups else None, excluded)


def columns_of_groups(
    groups: Sequence[str], key: str, *, atlas_groups: Mapping[str, Sequence[int]], region_ids: Sequence[int]
) -> list[int]:
    """The membership columns of the named groups' regions."""
    unknown = [name for name in groups if name not in atlas_groups]
    if unknown:
        raise MaskingError(f"masking.{key}: no group {unknown} in this atlas; it has {sorted(atlas_groups)}")
    wanted = {label for name in groups for label in atlas_groups[name]}
    return [column for column, label in enumerate(region_ids) if label in wanted]


def masking_problems(
    config: MaskingConfig, membership: Float[Tensor, "patch region"], *, columns: Columns, num_tubelets: int
) -> list[str]:
    """The reasons why this masking cannot hide its budget on this layout, with numbers; empty when it can."""
    num_patches = membership.shape[0]
    budget = num_hidden_patches(config.hidden_share, num_patches)
    problems = []
    if not 0 < budget < num_patches:
        problems.append(
            f"masking.hidden_share: {config.hidden_share} hides {budget} of {num_patches} patches, but at least one "
            f"must be hidden and one visible; give a {'larger' if budget <= 0 else 'smaller'} share"
        )
    if config.kind == "future" and num_tubelets < 2:
        problems.append("masking.kind: 'future' needs windows of at least 2 tubelets; lengthen window_frames")
    can_hide = int(eligible_patches(membership, config, columns).sum())
    if budget > can_hide:
        only = f" of the groups {config.groups}" if config.groups else ""
        only += f" without the groups {config.exclude}" if config.exclude else ""
        problems.append(
            f"masking.hidden_share: {config.hidden_share} asks for {budget} of {num_patches} patches, but "
            f"'{config.kind}' with rule '{config.rule}'{only} reaches {can_hide} ({can_hide / num_patches:.3f}); "
            f"lower it to at most {can_hide / num_patches:.3f} or choose another rule"
        )
    return problems


class Masker(nn.Module):
    """Chooses the hidden tokens of a batch; built once from a configuration and a membership matrix."""

    regions: Int64[Tensor, "patch choice"]
    eligible: Bool[Tensor, "key"]
    key_offsets: Int64[Tensor, "key"]
    region_offsets: Int64[Tensor, "region"]

    def __init__(
        self,
        config: MaskingConfig,
        membership: Float[Tensor, "patch region"],
        *,
        columns: Columns,
        num_tubelets: int,
    ) -> None:
        problems = masking_problems(config, membership, columns=columns, num_tubelets=num_tubelets)
        if problems:
            raise MaskingError("; ".join(problems))
        super().__init__()
        self.strategy = STRATEGIES[config.kind]
        self.num_patches, num_regions = membership.shape
        self.num_tubelets = num_tubelets
        self.num_tokens = self.num_patches * num_tubelets
        self.num_hidden = num_hidden_patches(config.hidden_share, self.num_patches) * num_tubelets
        keys_per_patch = 1 if self.strategy.hides_whole_patches else num_tubelets
        for name, tensor in {
            "regions": regions_of_patches(membership, config.rule, columns.allowed),
            "eligible": eligible_patches(membership, config, columns).repeat(keys_per_patch),
            "key_offsets": stream_offsets(self.num_patches * keys_per_patch, stream=0),
            "region_offsets": stream_offsets(num_regions, stream=1),
        }.items():
            self.register_buffer(name, tensor, persistent=False)

    def choose(self, sample_seed: Int64[Tensor, "batch"]) -> TokenChoice:
        """Each sample's hidden and visible tokens, a function of its own seed only.

        The lowest keys are hidden. Their low 31 bits are random and break ties, so what crosses the budget is trimmed
        at random.
        """
        keys = random_bits(sample_seed, self.key_offsets)
        if self.strategy.comes_first is not None:
            keys = keys + (self.strategy.comes_first(self, sample_seed) << 31)
        order = torch.where(self.eligible, keys, _NEVER).argsort(dim=1, stable=True)
        if self.strategy.hides_whole_patches:
            first_token = torch.arange(self.num_tubelets, device=order.device) * self.num_patches
            order = (order[:, :, None] + first_token).flatten(1)
        hidden, visible = order[:, : self.num_hidden], order[:, self.num_hidden :]
        return TokenChoice(hidden.sort(dim=1).values, visible.sort(dim=1).values)


def region_numbers(masker: Masker, sample_seed: Int64[Tensor, "batch"]) -> Int64[Tensor, "batch patch"]:
    """A random number per region; a patch gets the lowest of its regions', one without a region a number above all."""
    numbers = random_bits(sample_seed, masker.region_offsets)
    above_all = torch.full_like(numbers[:, :1], 1 << 31)
    return torch.cat([numbers, above_all], dim=1)[:, masker.regions].amin(dim=2)


def tubelets_left(masker: Masker, sample_seed: Int64[Tensor, "batch"]) -> Int64[Tensor, "token"]:
    """How many tubelets follow each token's."""
    following = torch.arange(masker.num_tubelets - 1, -1, -1, device=sample_seed.device)
    return following.repeat_interleave(masker.num_patches)


@dataclass(frozen=True)
class Strategy:
    """How tokens are sorted before the first ones are hidden, up to the budget."""

    hides_whole_patches: bool  # one key per patch, which hides it in every tubelet; else one key per token
    comes_first: Callable[[Masker, Tensor], Tensor] | None  # lowest is hidden first; None: all tokens are equal


STRATEGIES: dict[StrategyName, Strategy] = {
    "random": Strategy(hides_whole_patches=False, comes_first=None),
    "tube": Strategy(hides_whole_patches=True, comes_first=None),
    "future": Strategy(hides_whole_patches=False, comes_first=tubelets_left),
    "region": Strategy(hides_whole_patches=True, comes_first=region_numbers),
}
