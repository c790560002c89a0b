import numpy as np
import pytest
import torch

from pretrain.errors import MaskingError
from pretrain.masked.masked_set import Geometry
from pretrain.masked.masking import (
    Columns,
    Masker,
    MaskingConfig,
    columns_of_groups,
    hidable_columns,
    masking_problems,
    random_bits,
    reachable,
    region_numbers,
    regions_of_patches,
    stream_offsets,
)
from pretrain.masked.planning import reach_of_groups
from tests.phantom_spaces import AAL3_LABELS, aal3_like, aal3_like_sizes

REGION_IDS = [1, 2, 4, 7, 9, 10]  # gaps in the numbering; 7 has one voxel, 9 has two; 10 stands for a pseudo-region
PATCH_LABELS = [  # 8 voxels a patch
    [1] * 8,
    [1] * 5 + [2] * 3,
    [2] * 8,
    [2] * 6 + [9] * 2,
    [4] * 7 + [7],
    [4] * 4 + [10] * 4,
    [10] * 8,
    [10] * 8,
    [10] * 5 + [1] * 3,
    [4] * 8,
]
GROUPS = {"limbic": [4, 7], "tiny": [9]}


@pytest.fixture
def membership() -> torch.Tensor:
    share = [[np.mean(np.array(labels) == region) for region in REGION_IDS] for labels in PATCH_LABELS]
    return torch.tensor(share, dtype=torch.float32)


def columns(config: MaskingConfig) -> Columns:
    return hidable_columns(config, atlas_groups=GROUPS, region_ids=REGION_IDS)


def config_of(kind: str = "region", **changes: object) -> MaskingConfig:
    return MaskingConfig(kind=kind, **({"hidden_share": 0.5, "rule": "any", "groups": [], "exclude": []} | changes))


def allowed(groups: list[str]) -> list[int] | None:
    return columns(config_of(groups=groups)).allowed


def masker(membership: torch.Tensor, kind: str, **changes: object) -> Masker:
    num_tubelets = changes.pop("num_tubelets", 3)
    config = config_of(kind, **changes)
    return Masker(config, membership, columns=columns(config), num_tubelets=num_tubelets)


SEEDS = torch.arange(400) * 7919 - 3


@pytest.mark.parametrize("kind", ["random", "tube", "future", "region"])
def test_every_arm_hides_exactly_the_budget_and_shows_the_rest(membership: torch.Tensor, kind: str) -> None:
    choice = masker(membership, kind).choose(SEEDS)
    assert choice.hidden.shape == (400, 15)
    both = torch.cat([choice.hidden, choice.visible], dim=1).sort(dim=1).values
    assert torch.equal(both, torch.arange(30).expand(400, 30))


@pytest.mark.parametrize("kind", ["random", "tube", "future", "region"])
def test_a_sample_hides_the_same_tokens_in_any_batch(membership: torch.Tensor, kind: str) -> None:
    one = masker(membership, kind)
    whole = one.choose(SEEDS).hidden
    assert torch.equal(whole[[17]], one.choose(SEEDS[[17]]).hidden)
    assert torch.equal(whole.flip(0), one.choose(SEEDS.flip(0)).hidden)
    assert len(torch.unique(whole, dim=0)) > 10


def test_random_bits_are_the_published_splitmix64_and_uniform() -> None:
    def mix(state: int) -> int:
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        return state ^ (state >> 31)

    gamma = 0x9E3779B97F4A7C15
    for seed in (-5, 0, 2**62 + 12345):
        expected = [mix((mix(seed % 2**64) + (place + 1) * gamma) % 2**64) & 0x7FFFFFFF for place in range(5)]
        assert random_bits(torch.tensor([seed]), stream_offsets(5, stream=0))[0].tolist() == expected
    numbers = random_bits(SEEDS, stream_offsets(50, stream=1)).double() / 2**31
    assert abs(float(numbers.mean()) - 0.5) < 0.01
    assert abs(float(numbers.var()) - 1 / 12) < 0.003


def test_tube_hides_whole_patches_over_all_tubelets(membership: torch.Tensor) -> None:
    hidden = masker(membership, "tube").choose(SEEDS).hidden
    patches = (hidden % 10).sort(dim=1).values.reshape(400, 5, 3)
    assert torch.equal(patches, patches[:, :, :1].expand(-1, -1, 3))


def test_future_hides_the_last_tubelets_first(membership: torch.Tensor) -> None:
    tubelet = masker(membership, "future").choose(SEEDS).hidden // 10
    counts = torch.stack([(tubelet == number).sum(dim=1) for number in range(3)], dim=1)
    assert torch.equal(counts, torch.tensor([0, 5, 10]).expand(400, 3))


def test_random_hides_each_token_equally_often(membership: torch.Tensor) -> None:
    hidden = masker(membership, "random").choose(torch.arange(4000)).hidden
    share = torch.bincount(hidden.flatten(), minlength=30) / 4000
    assert torch.allclose(share, torch.full((30,), 0.5), atol=0.04)


def test_rules_give_the_regions_of_each_patch(membership: torch.Tensor) -> None:
    def of(rule: str) -> list[list[int]]:
        table = regions_of_patches(membership, rule, None)
        return [[REGION_IDS[column] for column in row if column < 6] for row in table.tolist()]

    assert of("majority") == [[1], [1], [2], [2], [4], [4], [10], [10], [10], [4]]
    assert of("any") == [[1], [1, 2], [2], [2, 9], [4, 7], [4, 10], [10], [10], [1, 10], [4]]
    assert of("pure") == [[1], [], [2], [], [], [], [10], [10], [], [4]]


def test_reach_of_a_rule_and_a_group(membership: torch.Tensor) -> None:
    def patches(rule: str, groups: list[str]) -> list[int]:
        return reachable(membership, rule, allowed(groups)).nonzero().flatten().tolist()

    assert patches("majority", []) == patches("any", []) == list(range(10))
    assert patches("pure", []) == [0, 2, 6, 7, 9]
    assert patches("majority", ["limbic"]) == [4, 5, 9]
    assert patches("any", ["limbic"]) == [4, 5, 9]
    assert patches("pure", ["limbic"]) == [9]
    assert patches("any", ["tiny"]) == [3]
    assert patches("majority", ["tiny"]) == []


@pytest.mark.parametrize("rule", ["majority", "any"])
def test_region_arm_hides_whole_regions_and_trims_only_the_last(membership: torch.Tensor, rule: str) -> None:
    one = masker(membership, "region", rule=rule, num_tubelets=1)
    numbers = region_numbers(one, SEEDS)
    for sample, hidden in enumerate(one.choose(SEEDS).hidden.tolist()):
        last = max(numbers[sample, patch].item() for patch in hidden)
        visible = set(range(10)) - set(hidden)
        assert all(numbers[sample, patch] >= last for patch in visible)


def test_patches_of_one_region_are_hidden_together(membership: torch.Tensor) -> None:
    one = masker(membership, "region", rule="majority", hidden_share=0.3, num_tubelets=1)
    hidden = one.choose(torch.arange(2000)).hidden
    is_hidden = torch.zeros(2000, 10, dtype=torch.bool).scatter_(1, hidden, True)
    together = (is_hidden[:, 2] == is_hidden[:, 3]).float().mean()
    apart = (is_hidden[:, 2] == is_hidden[:, 9]).float().mean()
    assert together > 0.85
    assert apart < 0.7


@pytest.mark.parametrize("kind", ["random", "tube", "future", "region"])
def test_named_groups_confine_every_arm(membership: torch.Tensor, kind: str) -> None:
    one = masker(membership, kind, rule="majority", groups=["limbic"], hidden_share=0.2)
    assert set((one.choose(SEEDS).hidden % 10).unique().tolist()) == {4, 5, 9}


def test_a_budget_out_of_reach_is_refused_with_the_number(membership: torch.Tensor) -> None:
    with pytest.raises(MaskingError, match=r"6 of 10 patches, but 'region' with rule 'pure' reaches 5 \(0\.500\)"):
        masker(membership, "region", rule="pure", hidden_share=0.6)
    assert masker(membership, "region", rule="pure", hidden_share=0.5).num_hidden == 15
    with pytest.raises(MaskingError, match=r"groups \['limbic'\] reaches 3 \(0\.300\)"):
        masker(membership, "tube", rule="any", groups=["limbic"], hidden_share=0.4)


def test_impossible_arms_are_refused(membership: torch.Tensor) -> None:
    whole = config_of("random", hidden_share=1.0)
    (problem,) = masking_problems(whole, membership, columns=columns(whole), num_tubelets=1)
    assert "hides 10 of 10 patches" in problem
    with pytest.raises(MaskingError, match="at least 2 tubelets"):
        masker(membership, "future", num_tubelets=1)
    with pytest.raises(MaskingError, match=r"no group \['limbick'\] in this atlas; it has \['limbic', 'tiny'\]"):
        allowed(["limbick"])


@pytest.mark.parametrize("kind", ["random", "tube", "future", "region"])
def test_excluded_groups_are_never_hidden_by_any_arm(membership: torch.Tensor, kind: str) -> None:
    def hidden_by(rule: str, **changes: object) -> set[int]:
        one = masker(membership, kind, rule=rule, hidden_share=0.1, **changes)
        return set((one.choose(SEEDS).hidden % 10).unique().tolist())

    # Region 2 lies in patches 1 to 3, and most of 2 and 3 is of it; 9 touches patch 3.
    assert hidden_by("any", exclude=["tiny"]) == set(range(10)) - {3}
    assert hidden_by("majority", exclude=["limbic"]) == set(range(10)) - {4, 5, 9}
    assert hidden_by("any", exclude=["limbic", "tiny"]) == {0, 1, 2, 6, 7, 8}
    assert hidden_by("any", groups=["limbic"], exclude=["tiny"]) == {4, 5, 9}


def test_a_budget_that_the_exclusion_leaves_no_room_for_is_refused(membership: torch.Tensor) -> None:
    with pytest.raises(MaskingError, match=r"without the groups \['limbic'\] reaches 7 \(0\.700\)"):
        masker(membership, "random", rule="any", exclude=["limbic"], hidden_share=0.8)
    with pytest.raises(MaskingError, match=r"masking.exclude: no group \['limbick'\] in this atlas"):
        masker(membership, "random", exclude=["limbick"])


@pytest.fixture(scope="module")
def brain() -> Geometry:
    return aal3_like(patch_voxels=6)


def arm(brain: Geometry, kind: str, **changes: object) -> Masker:
    return brain.masker(config_of(kind, **({"rule": "majority"} | changes)))


def is_hidden(one: Masker, num_samples: int) -> torch.Tensor:
    """[sample tubelet patch]"""
    hidden = one.choose(torch.arange(num_samples) * 104729).hidden
    flat = torch.zeros(num_samples, one.num_tokens, dtype=torch.bool).scatter_(1, hidden, True)
    return flat.reshape(num_samples, one.num_tubelets, one.num_patches)


def test_an_atlas_with_gaps_and_specks_keeps_every_label_and_its_size(brain: Geometry) -> None:
    membership = brain.atlas.membership(brain.layout, brain.space)
    assert membership.region_ids[membership.is_named].tolist() == AAL3_LABELS.tolist()
    voxels = (membership.shares * brain.layout.voxels_per_patch[:, None]).sum(axis=0)
    named = dict(zip(membership.region_ids.tolist(), np.round(voxels).astype(int).tolist(), strict=True))
    assert (named[133], named[134], named[170]) == (2, 1, aal3_like_sizes()[-1])
    assert sum(named[int(label)] for label in AAL3_LABELS) == 185_751
    assert sum(named.values()) == brain.space.num_voxels


def test_every_arm_and_rule_hides_the_same_number_of_tokens_of_a_whole_brain(brain: Geometry) -> None:
    budgets = {
        arm(brain, kind, rule=rule).num_hidden
        for kind in ("random", "tube", "future", "region")
        for rule in ("majority", "any")
    }
    assert budgets == {2 * round(0.5 * brain.layout.num_patches)}
    for kind in ("random", "region"):
        assert is_hidden(arm(brain, kind), 20).sum(dim=(1, 2)).unique().tolist() == list(budgets)


@pytest.mark.parametrize("rule", ["majority", "any"])
def test_hidden_regions_of_a_whole_brain_are_whole_but_for_one(brain: Geometry, rule: str) -> None:
    one = arm(brain, "region", rule=rule)
    hidden = is_hidden(one, 40)
    assert torch.equal(hidden[:, 0], hidden[:, 1])  # over all tubelets, as the tube arm
    shares, _ = brain.membership(config_of(rule=rule))
    table = regions_of_patches(shares, rule, None)
    belongs = torch.zeros(len(shares), shares.shape[1] + 1).scatter_(1, table, 1.0)[:, :-1]
    regions_with_patches = belongs.any(dim=0)
    for sample in hidden[:, 0].float():
        share = (sample @ belongs) / belongs.sum(dim=0).clamp(min=1)
        if rule == "majority":  # a patch is of one region: each is hidden whole, shown whole, or the last one, trimmed
            partly = (share > 0) & (share < 1)
            assert int(partly.sum()) <= 1
        whole = belongs[:, (share == 1) & regions_with_patches].any(dim=1)
        trimmed = int((sample.bool() & ~whole).sum())
        assert trimmed <= int(belongs.sum(dim=0).max())


def test_each_region_is_hidden_about_as_often_as_any_other(brain: Geometry) -> None:
    """Being hidden must not depend on a region's size, or small regions would hardly be learned."""
    hidden = is_hidden(arm(brain, "region"), 600)[:, 0].float().mean(dim=0)
    shares, _ = brain.membership(config_of())
    largest = shares.max(dim=1).indices
    often = torch.stack([hidden[largest == region].mean() for region in largest.unique()])
    assert float(often.mean()) == pytest.approx(0.5, abs=0.03)
    assert float(often.min()) > 0.38
    assert float(often.max()) < 0.62


def test_specks_are_reached_by_any_but_by_no_majority(brain: Geometry) -> None:
    shares, _ = brain.membership(config_of())
    ids = brain.atlas.membership(brain.layout, brain.space).region_ids.tolist()
    for label in (133, 134):
        assert int(reachable(shares, "any", [ids.index(label)]).sum()) in (1, 2)
        assert int(reachable(shares, "majority", [ids.index(label)]).sum()) == 0
    reach = reach_of_groups(shares, brain)
    assert reach["majority"]["brain"] == reach["any"]["brain"] == 1
    assert reach["pure"]["brain"] < 0.4
    for group in brain.atlas.groups:
        assert reach["pure"][group] <= reach["majority"][group] <= reach["any"][group]
    limbic = reachable(shares, "any", columns_of_groups(["limbic"], "groups", **tables(brain)))
    assert reach["any"]["limbic"] == pytest.approx(float(limbic.float().mean()))


def tables(brain: Geometry) -> dict:
    ids = brain.atlas.membership(brain.layout, brain.space).region_ids.tolist()
    return {"atlas_groups": brain.atlas.groups, "region_ids": ids}


@pytest.mark.parametrize("kind", ["random", "tube", "future", "region"])
def test_limited_and_excluding_arms_of_a_whole_brain_keep_to_their_patches(brain: Geometry, kind: str) -> None:
    shares, _ = brain.membership(config_of())
    cerebellum = columns_of_groups(["cerebellum"], "groups", **tables(brain))
    touches = shares[:, cerebellum].sum(dim=1) > 0
    is_most = torch.isin(shares.max(dim=1).indices, torch.tensor(cerebellum))
    only = is_hidden(arm(brain, kind, groups=["cerebellum"], hidden_share=0.05), 30).any(dim=0).any(dim=0)
    assert not bool((only & ~is_most).any())
    assert int(only.sum()) > 0.05 * len(only)
    without = (
        is_hidden(arm(brain, kind, rule="any", exclude=["cerebellum"], hidden_share=0.3), 30).any(dim=0).any(dim=0)
    )
    assert not bool((without & touches).any())
    assert bool(without[~touches].float().mean() > 0.9)
