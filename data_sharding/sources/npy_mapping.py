"""Reads the pickled dictionaries that some data sets keep in .npy files, without running anything that is in them.

Promise: no class or function named in the file is imported or called, numpy's own included; stand-ins take their place.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np

from data_sharding.errors import SourceError

MAX_BYTES = 1 << 20
ARRAY_PARTS = {"_reconstruct", "ndarray", "dtype"}  # all that a pickled array of objects names
NUMPY_MODULES = {"numpy", "numpy.core.multiarray", "numpy._core.multiarray"}


class _StandIn:
    """Takes the place of an array or a type, and keeps the state it is given."""

    state: object = None

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        self.state = state


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        if module in NUMPY_MODULES and name in ARRAY_PARTS:
            return _StandIn
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def read_mapping(path: Path) -> dict[int, str]:
    """The {number: name} dictionary of a .npy file; SourceError when the file holds anything else."""
    try:
        data = path.read_bytes() if path.stat().st_size <= MAX_BYTES else b""
        file = io.BytesIO(data)
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        if shape != () or dtype != np.dtype(object):
            raise ValueError(f"an array of {dtype} of shape {shape}")
        array = _PlainUnpickler(file).load()
        (mapping,) = array.state[4]
        plain = {int(label): name for label, name in mapping.items()}
        if not all(isinstance(name, str) for name in plain.values()):
            raise ValueError("names that are no text")
    except (
        OSError,
        ValueError,
        EOFError,
        TypeError,
        AttributeError,
        IndexError,
        KeyError,
        pickle.UnpicklingError,
    ) as error:
        raise SourceError(
            f"{path}: not a dictionary of numbers and names ({error}); fetch the data set's own file again"
        ) from error
    return plain
