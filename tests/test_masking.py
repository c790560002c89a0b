import numpy as np
import pytest
import torch

from pretrain.errors import MaskingError
from pretrain.masking import (
    Columns,
    Masker,
    MaskingConfig,
    hidable_columns,
    masking_problems,
    random_bits,
    reachable,
    regions_of_patches,
)

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
        assert random_bits(torch.tensor([seed]), 5, stream=0)[0].tolist() == expected
    numbers = random_bits(SEEDS, 50, stream=1).double() / 2**31
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
    numbers = one._region_numbers(SEEDS)
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
