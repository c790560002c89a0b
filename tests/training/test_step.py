"""Tensors are found and changed wherever a batch holds them; what a batch computes lazily is left alone."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor
from training_toys import pair_batch, toy_batch

from training.step import tensors_in, with_tensors


class Pair(NamedTuple):
    values: Tensor
    name: str


@dataclasses.dataclass(frozen=True)
class Nested:
    sides: dict[str, object]
    rows: list[object]
    shape: tuple[object, ...]
    lazy: Tensor = dataclasses.field(init=False)

    def __getattr__(self, name: str) -> Tensor:
        if name == "lazy":
            raise ValueError("the lazy value was asked for")
        raise AttributeError(name)


def nested() -> Nested:
    inner = toy_batch([1], 2)
    return Nested(
        {"a": inner, "b": torch.ones(1)}, [torch.ones(2), "text", Pair(torch.ones(3), "c")], (torch.ones(4), 5)
    )


def test_every_tensor_of_a_nested_batch_is_found_once() -> None:
    sizes = [tensor.numel() for tensor in tensors_in(nested())]
    assert sizes == [12, 2, 2, 1, 2, 3, 4]  # features, targets and weight of the inner batch first
    assert len(tensors_in(pair_batch([1, 2], 3))) == 4  # two sides, subjects and weights


def test_changed_tensors_keep_their_containers_and_the_original_stays_as_it_was() -> None:
    batch = nested()
    doubled = with_tensors(batch, lambda tensor: 2 * tensor)
    assert isinstance(doubled, Nested)
    assert isinstance(doubled.rows[2], Pair)
    assert doubled.rows[1] == "text"
    assert doubled.shape[1] == 5
    for old, new in zip(tensors_in(batch), tensors_in(doubled), strict=True):
        assert torch.equal(2 * old, new)
    assert doubled.sides["a"].scan_ids == ["scan-0001", "padding"]
