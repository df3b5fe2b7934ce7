"""Two pieces of a network that do not need each other, at the same time on a GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["side_by_side"]


def side_by_side(
    first: Callable[[Tensor], Tensor], a: Tensor, second: Callable[[Tensor], Tensor], b: Tensor
) -> tuple[Tensor, Tensor]:
    """``first(a)`` and ``second(b)``; on a GPU on two streams, so that one fills what the other leaves idle.

    The scan waits for memory more than it computes, and few kernels of a small batch fill the chip. Where a host
    launches kernel by kernel it is the host that limits, and little is won; in a CUDA graph, much
    (docs/performance.md). Their backward passes run on the same two streams.

    Args:
        first: must not change what ``second`` reads.
        a: its argument.
        second: likewise.
        b: its argument.

    Returns:
        Both results, for the current stream.
    """
    if not a.is_cuda or torch.compiler.is_compiling():
        return first(a), second(b)
    here = torch.cuda.current_stream(a.device)
    beside = _beside(here)
    beside.wait_stream(here)
    with torch.cuda.stream(beside):
        of_second = second(b)
    of_first = first(a)
    here.wait_stream(beside)
    # The memory of either is freed for the stream it was made on; it must not be while the other one still reads it.
    b.record_stream(beside)
    of_second.record_stream(here)
    return of_first, of_second


@functools.cache
def _beside(stream: torch.cuda.Stream) -> torch.cuda.Stream:
    """The stream beside another, always the same, since memory is kept for each stream on its own."""
    return torch.cuda.Stream(stream.device)
