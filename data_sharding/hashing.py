"""Random numbers that depend on names only: the same on every machine, worker and library version.

numpy's generators may change their streams between versions; an order of samples may not.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:  # importing torch takes a second, which the processes that pack scans would wait for
    from torch import Tensor

    Integers = TypeVar("Integers", np.ndarray, Tensor)

GOLDEN_GAMMA = -7046029254386353131  # 0x9E3779B97F4A7C15, as are the two factors, in wrapping int64


def splitmix64(state: Integers) -> Integers:
    """int64 of the same shape: SplitMix64's output for each state (Steele, Lea, Flood 2014).

    The same numbers from numpy and from torch on any device: int64 wraps in both, and has all operators in torch, which
    uint64 has not.
    """
    state = (state ^ _shifted(state, 30)) * -4658895280553007687
    state = (state ^ _shifted(state, 27)) * -7723592293110705685
    return state ^ _shifted(state, 31)


def _shifted(state: Integers, bits: int) -> Integers:
    return (state >> bits) & ((1 << (64 - bits)) - 1)  # int64 shifts copies of the sign in; the hash needs zeros


def hash_name(*parts: object) -> int:
    """64 bits of SHA-256 over the parts, which are joined unambiguously."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def hash_names(names: list[str]) -> np.ndarray:
    """`hash_name` of each, as uint64 [name]."""
    return np.array([hash_name(name) for name in names], dtype=np.uint64)


def mix(values: np.ndarray, key: int) -> np.ndarray:
    """Uniform uint64 of the same shape, one per (value, key)."""
    with np.errstate(over="ignore"):
        mixed = splitmix64(np.asarray(values).astype(np.int64) + GOLDEN_GAMMA)
        return splitmix64(mixed ^ np.uint64(key).astype(np.int64)).astype(np.uint64)


def unit_interval(values: np.ndarray) -> np.ndarray:
    """float64 in [0, 1) from uint64 hashes of the same shape."""
    return (values >> np.uint64(11)).astype(np.float64) * 2.0**-53
