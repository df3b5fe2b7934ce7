"""How the C library's allocator treats the feature maps of a network that runs on a CPU."""

from __future__ import annotations

import ctypes
import sys

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, NEVER = -1, -3, -1  # of malloc.h
# Bytes that one tensor may take and still come from memory that was used before; older releases of glibc allow the
# second at most.
LARGEST_MAPS = 2**30, 2**25


def keep_freed_memory(device: torch.device | str = "cpu") -> bool:
    """Let this process keep what its main thread frees, instead of giving it back to the system and asking again.

    A slice of 240x240 lets hundreds of megabytes of maps come and go. glibc returns them, and the system fills them
    with zeros before it hands them out again (docs/performance.md). What was used once is held until the process ends.
    Other threads have memory of their own, for which this does nothing.

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
    return bool(mallopt(M_TRIM_THRESHOLD, NEVER))
