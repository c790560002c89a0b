"""The checksums of stored bytes: of every frame, checked at each read; of every member, checked by verify."""

from __future__ import annotations

import numpy as np
from isal import isal_zlib


def crc32_of_frames(frames: np.ndarray) -> np.ndarray:
    """uint32 [time]: crc32 of each frame's bytes; `frames` is C-contiguous [time, voxel]."""
    return np.array([isal_zlib.crc32(frame) for frame in np.ascontiguousarray(frames)], dtype=np.uint32)


def crc32(data: bytes) -> int:
    """crc32 of the bytes."""
    return isal_zlib.crc32(data)
