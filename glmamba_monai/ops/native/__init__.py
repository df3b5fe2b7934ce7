"""The compiled CPU backend: the map scan and the deformable convolution, forward and backward, in float32.

The kernels are plain C beside this file, built by the package where there is a compiler (setup.py). They know neither
Python nor torch: they take pointers, by ctypes, which lets go of the interpreter's lock while one runs. A call is cut
into items that this module hands out to as many threads as torch uses; how it is cut never depends on their number,
and so neither does the result. Their own threads, since a second OpenMP runtime would spin against that of torch.
"""

import ctypes
import os
import sys
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["deform_backward", "deform_forward", "load", "scan_backward", "scan_forward"]

# As in kernels.h.
INTERFACE = 1
DIRECTIONS, BLOCK, GROUP, STEPS, DEFORM_ITEM, PAD = 4, 16, 8, 64, 576, 16
# Channel blocks of one item of the scan's backward pass: more of them mean fewer partial sums of the gradients of B
# and C, less of them more items for the threads.
BLOCKS_PER_ITEM = 6
# Items of a deformable convolution's backward pass, at least; each has its own gradient of the input.
STRIPES = 16
LOG2_E = 1.4426950408889634


def _fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class _ScanArgs(ctypes.Structure):
    """`scan_args` of kernels.h."""

    _fields_ = [
        *_fields(ctypes.c_void_p, "u delta a b c skip bias states y"),
        *_fields(ctypes.c_void_p, "grad_y grad_u grad_delta grad_a grad_b grad_c grad_skip grad_bias"),
        *_fields(ctypes.c_int64, "batch height width channels states_n quadrants blocks_per_group"),
    ]


class _DeformArgs(ctypes.Structure):
    """`deform_args` of kernels.h."""

    _fields_ = [
        *_fields(ctypes.c_void_p, "input offset mask weight output"),
        *_fields(ctypes.c_void_p, "grad grad_parts grad_input grad_offset grad_mask grad_weight touched"),
        *_fields(ctypes.c_int64, "batch height width channels out_height out_width out_channels"),
        *_fields(ctypes.c_int64, "kernel_y kernel_x pad_y pad_x stripes"),
    ]


_Kernel = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int64)


class _KernelTable(ctypes.Structure):
    """`kernel_table` of kernels.h."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        *_fields(_Kernel, "scan_forward scan_backward deform_forward deform_backward deform_merge"),
    ]


def load() -> ModuleType:
    """This module, if its kernels are built.

    Raises:
        ImportError: they are not, or cannot be loaded.
    """
    _tables()
    return sys.modules[__name__]


@cache
def _tables() -> list[_KernelTable]:
    """The kernels for every instruction set of this processor, the best first."""
    folder = Path(__file__).parent
    files = [folder / f"_kernels{suffix}" for suffix in EXTENSION_SUFFIXES]
    file = next((f for f in files if f.is_file()), None)
    if file is None:
        raise ImportError(
            f"no compiled {files[0].name} in {folder}: the package was installed without a C compiler, or with another "
            "Python"
        )
    try:
        library = ctypes.CDLL(str(file))
        interface = library.glmamba_interface()
    except (OSError, AttributeError) as error:
        raise ImportError(f"{file} cannot be loaded: {error}") from error
    if interface != INTERFACE:
        raise ImportError(
            f"{file} was built from other sources (interface {interface}, not {INTERFACE}): install again"
        )
    library.glmamba_kernels.restype = ctypes.POINTER(_KernelTable)
    tables = []
    while table := library.glmamba_kernels(len(tables)):
        tables.append(table.contents)
    return tables


# --- threads -----------------------------------------------------------------------------------------------------


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    """The threads of a process; one per process, since threads do not survive a fork."""
    return ThreadPoolExecutor(os.cpu_count() or 1, f"glmamba-{process}")


def _run(kernel: Callable[..., int], args: ctypes.Structure, items: int) -> None:
    """Let this thread and others take items one by one until all are done."""
    left = deque(range(items))

    def work() -> None:
        while True:
            try:
                item = left.popleft()
            except IndexError:
                return
            if kernel(ctypes.byref(args), item):
                left.clear()
                raise MemoryError("no memory for the scratch space of a native kernel")

    helpers = min(torch.get_num_threads(), items) - 1
    futures = [_pool(os.getpid()).submit(work) for _ in range(helpers)]
    try:
        work()
    finally:
        # A helper that has not begun has nothing left to do; one that has may still be writing.
        errors = [future.exception() for future in futures if not future.cancel()]
    for error in errors:
        if error is not None:
            raise error


def _new(*shape: int) -> Tensor:
    return torch.empty(shape)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _plain(tensor: Tensor) -> Tensor:
    """The tensor as the kernels take it: float32, contiguous."""
    if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
        raise TypeError(f"native kernels: found {tensor.dtype} on {tensor.device}, expected torch.float32 on cpu")
    return tensor.detach().contiguous()


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


# --- scan --------------------------------------------------------------------------------------------------------


def _scan_args(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor, local: bool
) -> tuple[_ScanArgs, list[Tensor], tuple[int, int, int]]:
    """Arguments of a scan, the tensors that they point into, and the numbers of regions, blocks and chunks."""
    batch, height, width, channels = u.shape
    n = A.shape[2]
    quadrants = 2 if local else 1
    blocks = _up(channels, BLOCK) // BLOCK
    more_channels, more_states = blocks * BLOCK - channels, _up(n, GROUP) - n
    # Added states have the decay 1 and no input; added channels have no input either.
    a = F.pad(_plain(A) * LOG2_E, (0, more_states, 0, more_channels))
    a = a.view(DIRECTIONS, blocks, BLOCK, -1).transpose(2, 3).contiguous()
    b, c = (_plain(F.pad(x, (0, more_states))) if more_states else _plain(x) for x in (B, C))
    skip, bias = (F.pad(_plain(x), (0, more_channels)) for x in (D, delta_bias))
    tensors = [_plain(u), _plain(delta), a, b, c, skip, bias]
    args = _ScanArgs(
        *(x.data_ptr() for x in tensors),
        batch=batch,
        height=height,
        width=width,
        channels=channels,
        states_n=n + more_states,
        quadrants=quadrants,
        blocks_per_group=BLOCKS_PER_ITEM,
    )
    chunks = _up(height // quadrants * (width // quadrants), STEPS) // STEPS
    return args, tensors, (batch * quadrants**2, blocks, chunks)


def scan_forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    local: bool,
) -> tuple[Tensor, Tensor]:
    """`ss2d_scan` (see there for the arguments) and the states that its backward pass starts from.

    Returns:
        y, `(B, H, W, D)`, and the states before every 64th position of a scan, for `scan_backward` only; for 16
        states they take as much memory as u.

    Raises:
        TypeError: a tensor is not float32 on CPU.
        MemoryError: no memory for scratch space.
    """
    args, _tensors, (regions, blocks, chunks) = _scan_args(u, delta, A, B, C, D, delta_bias, local)
    y = _new(*u.shape)
    states = _new(regions, DIRECTIONS, chunks, blocks, args.states_n, BLOCK)
    args.y, args.states = y.data_ptr(), states.data_ptr()
    _run(_tables()[0].scan_forward, args, regions * blocks)
    return y, states


def scan_backward(
    grad_y: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    local: bool,
    states: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of `scan_forward` by u, delta, A, B, C, D and delta_bias, each in the shape of its tensor.

    Raises: as `scan_forward`.
    """
    args, _tensors, (regions, blocks, _) = _scan_args(u, delta, A, B, C, D, delta_bias, local)
    grad_y = _plain(grad_y)
    channels, n = A.shape[1:]
    groups = _up(blocks, BLOCKS_PER_ITEM) // BLOCKS_PER_ITEM
    grad_u, grad_delta = _new(*delta.shape), _new(*delta.shape)
    grad_a = _new(regions, DIRECTIONS, blocks, args.states_n, BLOCK)
    grad_b, grad_c = (_new(groups, *B.shape[:-1], args.states_n) for _ in range(2))
    grad_skip, grad_bias = (_new(regions, DIRECTIONS, blocks * BLOCK) for _ in range(2))
    args.states, args.grad_y = states.data_ptr(), grad_y.data_ptr()
    args.grad_u, args.grad_delta, args.grad_a = grad_u.data_ptr(), grad_delta.data_ptr(), grad_a.data_ptr()
    args.grad_b, args.grad_c = grad_b.data_ptr(), grad_c.data_ptr()
    args.grad_skip, args.grad_bias = grad_skip.data_ptr(), grad_bias.data_ptr()
    _run(_tables()[0].scan_backward, args, regions * DIRECTIONS * groups)
    return (
        grad_u.sum(3),
        grad_delta,
        grad_a.sum(0).transpose(2, 3).reshape(DIRECTIONS, -1, args.states_n)[:, :channels, :n],
        _sum_first(grad_b)[..., :n],
        _sum_first(grad_c)[..., :n],
        grad_skip.sum(0)[:, :channels],
        grad_bias.sum(0)[:, :channels],
    )


def _sum_first(parts: Tensor) -> Tensor:
    return parts[0] if parts.shape[0] == 1 else parts.sum(0)


# --- deformable convolution --------------------------------------------------------------------------------------


def _channels_last(x: Tensor) -> Tensor:
    """(B, C, H, W) in any memory order -> contiguous (B, H, W, C); nothing moves if it is channels_last already."""
    return _plain(x.permute(0, 2, 3, 1))


def _deform_args(
    input: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None, pad_y: int, pad_x: int
) -> tuple[_DeformArgs, list[Tensor | None]]:
    """Arguments of a deformable convolution but for its weight, and the tensors that they point into."""
    tensors = [None if x is None else _channels_last(x) for x in (input, offset, mask)]
    batch, channels, height, width = input.shape
    args = _DeformArgs(
        *(_pointer(x) for x in tensors),
        batch=batch,
        height=height,
        width=width,
        channels=channels,
        out_height=offset.shape[2],
        out_width=offset.shape[3],
        out_channels=weight.shape[0],
        kernel_y=weight.shape[2],
        kernel_x=weight.shape[3],
        pad_y=pad_y,
        pad_x=pad_x,
    )
    return args, tensors


def deform_forward(
    input: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None, pad_y: int, pad_x: int
) -> Tensor:
    """`deform_conv2d` (see there for the arguments) without its bias.

    Returns:
        `(B, C_out, H_out, W_out)`, channels last in memory.

    Raises:
        TypeError: a tensor is not float32 on CPU.
        MemoryError: no memory for scratch space.
    """
    args, _tensors = _deform_args(input, offset, weight, mask, pad_y, pad_x)
    batch, out_channels = input.shape[0], weight.shape[0]
    matrix = weight.permute(2, 3, 1, 0).reshape(-1, weight.shape[1], out_channels)  # (taps, C, C_out)
    matrix = _plain(F.pad(matrix, (0, _up(out_channels, PAD) - out_channels)))
    output = _new(batch, *offset.shape[2:], out_channels)
    args.weight, args.output = matrix.data_ptr(), output.data_ptr()
    size = offset.shape[2] * offset.shape[3]
    _run(_tables()[0].deform_forward, args, batch * (_up(size, DEFORM_ITEM) // DEFORM_ITEM))
    return output.permute(0, 3, 1, 2)


def deform_backward(
    grad: Tensor, input: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None, pad_y: int, pad_x: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of `deform_forward` by input, offset, weight and mask (None without one), channels last in memory.

    Raises: as `deform_forward`.
    """
    args, tensors = _deform_args(input, offset, weight, mask, pad_y, pad_x)
    out_channels, channels, kernel_y, kernel_x = weight.shape
    batch, _, height, width = input.shape
    grad = _channels_last(grad)
    matrix = weight.permute(2, 3, 0, 1).reshape(-1, out_channels, channels)  # (taps, C_out, C)
    matrix = _plain(F.pad(matrix, (0, _up(channels, PAD) - channels)))
    args.stripes = min(-(-STRIPES // max(batch, 1)), offset.shape[2])
    # By NumPy, whose zeros take memory only where they are written: few rows of each image are.
    grad_parts = np.zeros((batch, args.stripes, height, width, channels), np.float32)
    touched = np.zeros((batch, args.stripes, 2), np.int64)
    grad_input = _new(batch, height, width, channels)
    grad_offset, grad_mask = (None if x is None else _new(*x.shape) for x in tensors[1:])
    grad_weight = torch.zeros(batch * args.stripes, kernel_y, kernel_x, channels, _up(out_channels, PAD))
    args.weight, args.grad, args.grad_input = matrix.data_ptr(), grad.data_ptr(), grad_input.data_ptr()
    args.grad_parts, args.touched = grad_parts.ctypes.data, touched.ctypes.data
    args.grad_offset, args.grad_mask = _pointer(grad_offset), _pointer(grad_mask)
    args.grad_weight = grad_weight.data_ptr()
    _run(_tables()[0].deform_backward, args, batch * args.stripes)
    _run(_tables()[0].deform_merge, args, batch * height)
    return (
        grad_input.permute(0, 3, 1, 2),
        grad_offset.permute(0, 3, 1, 2),
        grad_weight.sum(0)[..., :out_channels].permute(3, 2, 0, 1),
        None if grad_mask is None else grad_mask.permute(0, 3, 1, 2),
    )
