"""Two pieces of a network that do not need each other, at the same time on a GPU."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["expect_other_streams", "forgo_streams", "side_by_side"]

_forgone = False


def side_by_side(
    first: Callable[[Tensor], Tensor], a: Tensor, second: Callable[[Tensor], Tensor], b: Tensor
) -> tuple[Tensor, Tensor]:
    """``first(a)`` and ``second(b)``; on a GPU on two streams, so that one fills what the other leaves idle.

    The scan waits for memory more than it computes, and few kernels of a small batch fill the chip. That pays in a CUDA
    graph; where a host launches kernel by kernel, it is the host that limits (docs/performance.md, two streams). Their
    backward passes run on the same two streams.

    Args:
        first: must not change what ``second`` reads.
        a: its argument.
        second: likewise.
        b: its argument.

    Returns:
        Both results, for the current stream.
    """
    if not a.is_cuda or _forgone or torch.compiler.is_compiling():
        return first(a), second(b)
    here = torch.cuda.current_stream(a.device)
    beside = _beside(here)
    beside.wait_stream(here)
    # The memory of either stream is freed for that stream; it must not be while the other one still reads it.
    b.record_stream(beside)
    try:
        with torch.cuda.stream(beside):
            of_second = second(b)
        of_first = first(a)
    finally:
        here.wait_stream(beside)  # after an error too: a capture ends with one stream only
    of_second.record_stream(here)
    return of_first, of_second


def forgo_streams() -> None:
    """From now on, one after the other.

    For a process in which the capture of a CUDA graph has failed: torch (2.11 at least) goes on believing that it is
    capturing, and memory that two streams have used is never free again.
    """
    global _forgone
    _forgone = True


def expect_other_streams() -> None:
    """Let torch not warn that a gradient comes on another stream than its parameter's: here that is meant."""
    warnings.filterwarnings("ignore", "The AccumulateGrad node's stream does not match", UserWarning)


@functools.cache
def _beside(stream: torch.cuda.Stream) -> torch.cuda.Stream:
    """The stream beside another, always the same, since memory is kept for each stream on its own."""
    expect_other_streams()
    return torch.cuda.Stream(stream.device)
