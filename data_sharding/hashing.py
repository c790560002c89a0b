"""Random numbers that depend on names only: the same on every machine, worker and library version.

numpy's generators may change their streams between versions; an order of samples may not.
"""

from __future__ import annotations

import hashlib

import numpy as np

GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
FIRST_FACTOR = np.uint64(0xBF58476D1CE4E5B9)
SECOND_FACTOR = np.uint64(0x94D049BB133111EB)


def hash_name(*parts: object) -> int:
    """64 bits of SHA-256 over the parts, which are joined unambiguously."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def hash_names(names: list[str]) -> np.ndarray:
    """`hash_name` of each, as uint64 [name]."""
    return np.array([hash_name(name) for name in names], dtype=np.uint64)


def mix(values: np.ndarray, key: int) -> np.ndarray:
    """Uniform uint64 of the same shape, one per (value, key): splitmix64's finaliser (Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        mixed = _finalise(np.asarray(values, dtype=np.uint64) + GOLDEN_GAMMA)
        return _finalise(mixed ^ np.uint64(key))


def _finalise(values: np.ndarray) -> np.ndarray:
    values = (values ^ (values >> np.uint64(30))) * FIRST_FACTOR
    values = (values ^ (values >> np.uint64(27))) * SECOND_FACTOR
    return values ^ (values >> np.uint64(31))


def unit_interval(values: np.ndarray) -> np.ndarray:
    """float64 in [0, 1) from uint64 hashes of the same shape."""
    return (values >> np.uint64(11)).astype(np.float64) * 2.0**-53
