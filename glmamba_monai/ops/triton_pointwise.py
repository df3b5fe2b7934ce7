"""The cheap steps between the heavy ones as Triton kernels (CUDA): each map is read once and written once.

Rows are positions, `(rows, channels)`, channels contiguous. A program walks over tiles of rows; in a backward pass it
keeps the sums for the per-channel parameters in registers, and the few programs' sums are added up afterwards.
"""

# ruff: noqa: ANN001, ANN202 (types of the kernels' arguments are Triton's)

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "bias_silu_backward",
    "bias_silu_forward",
    "modulate_backward",
    "modulate_forward",
    "norm_gate_backward",
    "norm_gate_forward",
]

TILE = 2048  # numbers of a tile: 16 rows of 128 channels
PROGRAMS_PER_PROCESSOR = 4  # of a backward kernel: each leaves one row of parameter gradients


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _rows(tile, rows, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """64-bit row numbers (ROWS, 1), channels and which numbers of the tile there are."""
    row = tl.full((), tile, tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, CHANNELS)
    return row[:, None], d, (row < rows)[:, None] & (d < channels)[None, :]


@triton.jit
def _normalised(y, place, valid, channels, eps):
    """The rows less their mean over their deviation, and one over the deviation."""
    x = tl.load(y + place, mask=valid, other=0.0).to(tl.float32)
    x = tl.where(valid, x - (tl.sum(x, 1) / channels)[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(x * x, 1) / channels + eps)[:, None]
    return x * scale, scale


@triton.jit
def _norm_gate_kernel(
    y, weight, bias, gate, out, rows, channels, gate_row, eps,
    GATE: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    row, d, valid = _rows(tl.program_id(0), rows, channels, ROWS, CHANNELS)
    w = tl.load(weight + d, mask=d < channels, other=0.0)[None, :]
    b = tl.load(bias + d, mask=d < channels, other=0.0)[None, :]
    x, _ = _normalised(y, row * channels + d[None, :], valid, channels, eps)
    x = x * w + b
    if GATE:
        g = tl.load(gate + row * gate_row + d[None, :], mask=valid, other=0.0).to(tl.float32)
        x *= g * _sigmoid(g)
    tl.store(out + row * channels + d[None, :], x, mask=valid)


@triton.jit
def _norm_gate_backward_kernel(
    dout, y, weight, bias, gate, dy, dgate, dweight, dbias, rows, channels, gate_row, eps,
    GATE: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, CHANNELS)
    w = tl.load(weight + d, mask=d < channels, other=0.0)[None, :]
    b = tl.load(bias + d, mask=d < channels, other=0.0)[None, :]
    dw_sum = tl.zeros((ROWS, CHANNELS), tl.float32)
    db_sum = tl.zeros((ROWS, CHANNELS), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row, d, valid = _rows(tile, rows, channels, ROWS, CHANNELS)
        place = row * channels + d[None, :]
        x, scale = _normalised(y, place, valid, channels, eps)
        dn = tl.load(dout + place, mask=valid, other=0.0).to(tl.float32)
        if GATE:
            g = tl.load(gate + row * gate_row + d[None, :], mask=valid, other=0.0).to(tl.float32)
            sigmoid = _sigmoid(g)
            tl.store(dgate + place, dn * (x * w + b) * (sigmoid * (1.0 + g * (1.0 - sigmoid))), mask=valid)
            dn *= g * sigmoid  # from here on the gradient of the normalised, scaled and shifted row
        dw_sum += dn * x
        db_sum += dn
        dx = dn * w
        mean, along = tl.sum(dx, 1) / channels, tl.sum(dx * x, 1) / channels
        tl.store(dy + place, (dx - mean[:, None] - x * along[:, None]) * scale, mask=valid)
    place = tl.program_id(0) * channels + d
    tl.store(dweight + place, tl.sum(dw_sum, 0), mask=d < channels)
    tl.store(dbias + place, tl.sum(db_sum, 0), mask=d < channels)


@triton.jit
def _bias_silu_kernel(
    x, bias, residual, out, rows, channels, x_row,
    RESIDUAL: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    row, d, valid = _rows(tl.program_id(0), rows, channels, ROWS, CHANNELS)
    b = tl.load(bias + d, mask=d < channels, other=0.0)[None, :]
    v = tl.load(x + row * x_row + d[None, :], mask=valid, other=0.0).to(tl.float32) + b
    v = v * _sigmoid(v)
    if RESIDUAL:
        v += tl.load(residual + row * channels + d[None, :], mask=valid, other=0.0).to(tl.float32)
    tl.store(out + row * channels + d[None, :], v, mask=valid)


@triton.jit
def _bias_silu_backward_kernel(
    dout, x, bias, dx, dbias, rows, channels, x_row, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):
    d = tl.arange(0, CHANNELS)
    b = tl.load(bias + d, mask=d < channels, other=0.0)[None, :]
    db_sum = tl.zeros((ROWS, CHANNELS), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row, d, valid = _rows(tile, rows, channels, ROWS, CHANNELS)
        v = tl.load(x + row * x_row + d[None, :], mask=valid, other=0.0).to(tl.float32) + b
        sigmoid = _sigmoid(v)
        g = tl.load(dout + row * channels + d[None, :], mask=valid, other=0.0).to(tl.float32)
        g *= sigmoid * (1.0 + v * (1.0 - sigmoid))
        db_sum += g
        tl.store(dx + row * channels + d[None, :], g, mask=valid)
    tl.store(dbias + tl.program_id(0) * channels + d, tl.sum(db_sum, 0), mask=d < channels)


@triton.jit
def _patch_row(row, width, PATCHES: tl.constexpr):
    """Where a pixel's row lies if the pixels are stored patch by patch; heights are even, so images need no care."""
    if not PATCHES:
        return row
    y, x = row // width, row % width
    return (y // 2 * (width // 2) + x // 2) * 4 + y % 2 * 2 + x % 2


@triton.jit
def _modulate_kernel(
    deform, mamba, out, rows, channels, width, PATCHES: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):
    row, d, valid = _rows(tl.program_id(0), rows, channels, ROWS, CHANNELS)
    place = row * channels + d[None, :]
    patch_place = _patch_row(row, width, PATCHES) * channels + d[None, :]
    f = tl.load(deform + place, mask=valid, other=0.0).to(tl.float32)
    m = tl.load(mamba + patch_place, mask=valid, other=0.0).to(tl.float32)
    tl.store(out + place, _sigmoid(f) * m + f, mask=valid)


@triton.jit
def _modulate_backward_kernel(
    dout, deform, mamba, ddeform, dmamba, rows, channels, width,
    PATCHES: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    row, d, valid = _rows(tl.program_id(0), rows, channels, ROWS, CHANNELS)
    place = row * channels + d[None, :]
    patch_place = _patch_row(row, width, PATCHES) * channels + d[None, :]
    g = tl.load(dout + place, mask=valid, other=0.0).to(tl.float32)
    s = _sigmoid(tl.load(deform + place, mask=valid, other=0.0).to(tl.float32))
    m = tl.load(mamba + patch_place, mask=valid, other=0.0).to(tl.float32)
    tl.store(ddeform + place, g * (1.0 + s * (1.0 - s) * m), mask=valid)
    tl.store(dmamba + patch_place, g * s, mask=valid)


# --- launches ----------------------------------------------------------------------------------------------------


def _shape(x: Tensor) -> tuple[int, int, dict[str, int]]:
    """Rows, channels and the constants of a launch for `(..., channels)`."""
    channels = x.shape[-1]
    width = triton.next_power_of_2(channels)
    return x.numel() // channels, channels, {"CHANNELS": width, "ROWS": max(1, TILE // width), "num_warps": 4}


def _even_rows(x: Tensor) -> tuple[Tensor, int]:
    """A tensor `(..., channels)` whose rows follow each other evenly, and their distance."""
    flat = x.flatten(0, -2)
    if flat.stride(-1) != 1:
        flat = flat.contiguous()
    return flat, flat.stride(0)


def _programs(x: Tensor, tiles: int) -> int:
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    return max(1, min(tiles, PROGRAMS_PER_PROCESSOR * processors))


def norm_gate_forward(y: Tensor, weight: Tensor, bias: Tensor, gate: Tensor | None, eps: float) -> Tensor:
    """See :func:`glmamba_monai.ops.norm_gate`."""
    rows, channels, constants = _shape(y)
    y = y.contiguous()
    flat_gate, gate_row = (y, channels) if gate is None else _even_rows(gate)
    out = torch.empty(y.shape, dtype=flat_gate.dtype, device=y.device)
    if rows:
        with torch.cuda.device_of(y):
            _norm_gate_kernel[(triton.cdiv(rows, constants["ROWS"]),)](
                *(y, weight.float(), bias.float(), flat_gate, out, rows, channels, gate_row, eps),
                GATE=gate is not None,
                **constants,
            )
    return out


def norm_gate_backward(
    dout: Tensor, y: Tensor, weight: Tensor, bias: Tensor, gate: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of y, weight, bias and gate (of no gate: an empty tensor)."""
    rows, channels, constants = _shape(y)
    y, dout = y.contiguous(), dout.contiguous()
    flat_gate, gate_row = (y, channels) if gate is None else _even_rows(gate)
    dy = torch.empty_like(y)
    dgate = y.new_empty((0,)) if gate is None else torch.empty(gate.shape, dtype=gate.dtype, device=y.device)
    programs = _programs(y, triton.cdiv(rows, constants["ROWS"]))
    dweight, dbias = (y.new_empty((programs, channels), dtype=torch.float32) for _ in range(2))
    with torch.cuda.device_of(y):
        _norm_gate_backward_kernel[(programs,)](
            *(dout, y, weight.float(), bias.float(), flat_gate, dy, dgate, dweight, dbias),
            *(rows, channels, gate_row, eps),
            GATE=gate is not None,
            **constants,
        )
    return dy, dweight.sum(0).to(weight.dtype), dbias.sum(0).to(bias.dtype), dgate


def bias_silu_forward(x: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
    """See :func:`glmamba_monai.ops.bias_silu`."""
    rows, channels, constants = _shape(x)
    flat, x_row = _even_rows(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    added = flat if residual is None else residual.contiguous()
    if rows:
        with torch.cuda.device_of(x):
            _bias_silu_kernel[(triton.cdiv(rows, constants["ROWS"]),)](
                flat, bias.float(), added, out, rows, channels, x_row, RESIDUAL=residual is not None, **constants
            )
    return out


def bias_silu_backward(dout: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and bias; the residual's is `dout`."""
    rows, channels, constants = _shape(x)
    flat, x_row = _even_rows(x)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    programs = _programs(x, triton.cdiv(rows, constants["ROWS"]))
    dbias = x.new_empty((programs, channels), dtype=torch.float32)
    with torch.cuda.device_of(x):
        _bias_silu_backward_kernel[(programs,)](
            dout.contiguous(), flat, bias.float(), dx, dbias, rows, channels, x_row, **constants
        )
    return dx, dbias.sum(0).to(bias.dtype)


def modulate_forward(deform: Tensor, mamba: Tensor) -> Tensor:
    """See :func:`glmamba_monai.ops.modulate`."""
    rows, channels, constants = _shape(deform)
    out = torch.empty(deform.shape, dtype=deform.dtype, device=deform.device)
    if rows:
        with torch.cuda.device_of(deform):
            _modulate_kernel[(triton.cdiv(rows, constants["ROWS"]),)](
                *(deform.contiguous(), mamba.contiguous(), out, rows, channels, deform.shape[2]),
                PATCHES=mamba.dim() == 6,
                **constants,
            )
    return out


def modulate_backward(dout: Tensor, deform: Tensor, mamba: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of deform and mamba."""
    rows, channels, constants = _shape(deform)
    ddeform, dmamba = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (deform, mamba))
    if rows:
        with torch.cuda.device_of(deform):
            _modulate_backward_kernel[(triton.cdiv(rows, constants["ROWS"]),)](
                *(dout.contiguous(), deform.contiguous(), mamba.contiguous(), ddeform, dmamba),
                *(rows, channels, deform.shape[2]),
                PATCHES=mamba.dim() == 6,
                **constants,
            )
    return ddeform, dmamba
