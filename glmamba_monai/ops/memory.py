"""How the C library's allocator treats the feature maps of a network that runs on a CPU."""

from __future__ import annotations

import ctypes
import sys

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
# Bytes that one tensor may take and still come from memory that was used before; older releases of glibc allow the
# second at most.
LARGEST_MAPS = 2**30, 2**25


def keep_freed_memory(device: torch.device | str = "cpu") -> bool:
    """Let this process keep what its tensors free, instead of giving it back to the system and asking again.

    A slice of 240x240 lets 800 MB of maps come and go, which glibc returns and the system fills with zeros again: a
    tenth of the time (docs/performance.md). The peak of the memory stays what it is; it is held until the process ends.

    Args:
        device: where the network runs; on a GPU nothing changes, torch keeps its memory anyway.

    Returns:
        Whether it does from now on: on Linux with glibc.
    """
    if torch.device(device).type != "cpu" or sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is None or not any(mallopt(M_MMAP_THRESHOLD, largest) for largest in LARGEST_MAPS):
        return False
    return bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
