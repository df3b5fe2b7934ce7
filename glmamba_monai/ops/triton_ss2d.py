"""The four-direction scan of `ss2d_scan` as Triton kernels (CUDA), forward and backward.

How the work is cut. A map (or quadrant) is walked along its rows and along its columns, both ways. A program owns a
few channels and one chunk of the tokens of one axis; nothing is copied or flipped: a direction is an order of visiting
positions. Inside, tiles are (TOKENS, STATES, CHANNELS) with channels and states across a warp's lanes and the tokens
in each thread's registers, so that the recurrence runs step by step without a thread waiting for another.

Chunks of one sequence run side by side, so that a single image fills the chip. `_carry_kernel` finds what each chunk
would end with if it started from zero; the kernels that follow chain these to the state that truly enters a chunk. A
chunk's decay needs no states: it is exp(A * sum of dt).

The backward recomputes the states, tile by tile, from the start of its chunk. With g_t the gradient of h_t and
c_t = C_t dy_t, the adjoint is g_t = c_t + a_{t+1} g_{t+1}; what enters a tile (or chunk) from the one after it is
a_t g_t, the gradient of the state before step t.

Sizes, what limits each kernel and what was tried: docs/performance.md.
"""

# ruff: noqa: ANN001, ANN202 (types of the kernels' arguments are Triton's)

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["backward", "forward"]

LOG2_E = tl.constexpr(1.4426950408889634)
LOG_2 = tl.constexpr(0.6931471805599453)

# Pointers whose alignment the compiler shall not use. It would load these small tiles in vectors, and that layout would
# spread to the state in the inner loop and cost shuffles at every step.
UNALIGNED = ["A", "carries", "adjoint_carries", "time_steps", "starts", "dA", "u", "delta", "first_y", "y", "source"]


# --- pieces ------------------------------------------------------------------------------------------------------


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def _row(tile, index: tl.constexpr):
    """tile[index]. As the tokens, the first axis, lie in a thread's registers, this costs no instruction."""
    token = tl.arange(0, tile.shape[0])[:, None, None, None]
    bits = tl.where(token == index, tile.to(tl.int32, bitcast=True), 0)
    return tl.reduce(bits, 0, _either).to(tl.float32, bitcast=True)


@triton.jit
def _set_row(tile, index: tl.constexpr, row):
    """The tile with tile[index] = row; costs no instruction either."""
    token = tl.arange(0, tile.shape[0])[:, None, None, None]
    return tl.where(token == index, row[None], tile)


@triton.jit
def _below(index, count, EVEN: tl.constexpr):
    """index < count; if EVEN, all of them by knowledge, which takes the masks out of the loads and stores."""
    if EVEN:
        return tl.full(index.shape, True, tl.int1)
    return index < count


@triton.jit
def _load_states(place, valid):
    """A tile (GROUPS, STATES, CHANNELS) from places (STATES, GROUPS, CHANNELS).

    The compiler lays a load's lanes along its first axis before its second, and here the states shall have them.
    """
    return tl.permute(tl.load(place, mask=valid, other=0.0), (1, 0, 2))


@triton.jit
def _store_states(place, tile, valid):
    tl.store(place, tl.permute(tile, (1, 0, 2)), mask=valid)


@triton.jit
def softplus_of(x):
    """log(1 + exp(x)), relatively accurate for small results too.

    log(1 + e) / e for 0 <= e <= 1 is a Chebyshev fit of degree 8, within 1.5e-7 relative.
    """
    e = tl.exp2(-tl.abs(x) * LOG2_E)
    p = -0.02958850748836994 + e * 0.005253457929939032
    p = -0.13674770295619965 + e * (0.07836166769266129 + e * p)
    p = -0.24844369292259216 + e * (0.19111430644989014 + e * p)
    p = 1.0 + e * (-0.49999502301216125 + e * (0.33319270610809326 + e * p))
    return tl.maximum(x, 0.0) + e * p


@triton.jit
def _softplus_slope(raw, dt, SOFTPLUS: tl.constexpr):
    """d dt / d raw, from what there is: sigmoid(raw), which is 1 - exp(-dt)."""
    if SOFTPLUS:
        return 1.0 / (1.0 + tl.exp2(-raw * LOG2_E))
    # The difference loses the digits of a small dt; there, the first terms of its series.
    series = dt * (1.0 - dt * (0.5 - dt * (0.16666667 - dt * 0.041666668)))
    return tl.where(dt < 0.05, series, 1.0 - tl.exp2(-dt * LOG2_E))


@triton.jit
def _first_position(region, height, width, map_height, map_width, LOCAL: tl.constexpr):
    """First position of a region in all the images: a whole map, or one of its four quadrants."""
    if LOCAL:
        quadrant = region % 4
        corner = (quadrant // 2) * height * map_width + (quadrant % 2) * width
        return (region // 4).to(tl.int64) * map_height * map_width + corner
    return region.to(tl.int64) * map_height * map_width


@triton.jit
def _lines(i, chunk, axis, height, width, map_width):
    """Of a chunk, which is whole lines (rows for axis 0, columns for 1): first and last line + 1, their length, and
    the distances in memory of lines and of positions in a line."""
    rows = axis == 0
    lines = tl.where(rows, height, width)
    end = tl.minimum((i + 1) * chunk, lines)
    begin = tl.minimum(i * chunk, end)
    return begin, end, tl.where(rows, width, height), tl.where(rows, map_width, 1), tl.where(rows, 1, map_width)


@triton.jit
def _visit(line, offset, begin, end, length, line_stride, stride, backwards, TOKENS: tl.constexpr, EVEN: tl.constexpr):
    """Position, from the region's first, of a tile: steps `offset` and on of a chunk's line in a direction.

    And which of them there are. If EVEN, there are all: what is loaded ahead of the chunk's end, or for an empty chunk,
    is another tile of the region, and is not used.
    """
    step = offset + tl.arange(0, TOKENS)
    y = tl.where(backwards, end - 1 - line, begin + line)
    valid = _below(step, tl.where((line >= 0) & (begin + line < end), length, 0), EVEN)
    if EVEN:
        y = tl.minimum(tl.maximum(y, begin), end - 1)  # in this order: an empty chunk begins after the last line
    x = tl.where(backwards, length - 1 - step, step)
    return y * line_stride + x * stride, valid


@triton.jit
def _next(line, offset, length, TOKENS: tl.constexpr):
    """The tile after this one, as (line, offset)."""
    offset += TOKENS
    turn = tl.where(offset < length, 0, 1)
    return line + turn, offset * (1 - turn)


@triton.jit
def _tile(pointer, position, token_stride, last, t_valid, last_valid):
    """A tile (TOKENS, ...) of what lies at each position; zero where there is nothing."""
    if len(last.shape) == 1:
        place = position[:, None] * token_stride + last[None, :]
        valid = t_valid[:, None] & last_valid[None, :]
    else:
        place = position[:, None, None] * token_stride + last[None]
        valid = t_valid[:, None, None] & last_valid[None]
    return tl.load(pointer + place, mask=valid, other=0.0)


@triton.jit
def _time_step(raw, bias, t_valid, SOFTPLUS: tl.constexpr):
    """dt of a tile (TOKENS, GROUPS, CHANNELS), zero where there is no token, which leaves the state alone; and raw."""
    raw = raw.to(tl.float32)
    if SOFTPLUS:
        raw += bias[None]
        return tl.where(t_valid[:, None, None], softplus_of(raw), 0.0), raw
    return raw, raw


@triton.jit
def _chained(carries, time_steps, rate, first, i, chunks, descending, channels, states, place, valid, d, d_valid):
    """The state (or its gradient) that enters chunk i, from the chunks before it in the recurrence's direction.

    `first` is the place of the region's and direction's chunk 0 in (regions, K, chunks); `descending` is 0 or 1.
    """
    state = tl.permute(tl.zeros(place.shape, tl.float32), (1, 0, 2))
    for j in range(i + descending * (chunks - 1 - 2 * i)):
        chunk = first + j + descending * (chunks - 1 - 2 * j)
        time = tl.load(time_steps + chunk * channels + d, mask=d_valid, other=0.0)
        carry = _load_states(carries + chunk * states * channels + place, valid)
        state = tl.exp2(time[:, None, :] * rate) * state + carry
    return state


# --- what a chunk adds -------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def _carry_kernel(
    source,  # u, or dy when ADJOINT
    delta,
    matrix,  # B, or C when ADJOINT
    A,
    delta_bias,
    carries,
    time_steps,  # written by the forward
    channels,
    states,
    height,
    width,
    map_height,
    map_width,
    positions,  # of all maps
    chunks,
    chunk,
    delta_token,
    delta_direction,
    matrix_token,
    matrix_direction,
    LOCAL: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    EVEN: tl.constexpr,
    ADJOINT: tl.constexpr,
    TOKENS: tl.constexpr,
    GROUPS: tl.constexpr,
    STATES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """The state each chunk ends with, from zero; ADJOINT: the gradient of the state each chunk starts with."""
    region = tl.program_id(2) // 4
    k = tl.program_id(2) % 4
    axis, backwards = k % 2, k // 2
    k64 = k.to(tl.int64)  # a direction may lie far away
    against = (backwards == 1) != ADJOINT  # the adjoint runs against the direction
    i = tl.program_id(1) + tl.where(against, 1, 0)  # nothing follows the chunk left out
    base = _first_position(region, height, width, map_height, map_width, LOCAL)
    d = (tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)[:, None]) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    n = tl.arange(0, STATES)
    d_valid = _below(d, channels, EVEN)
    n_valid = _below(n, states, EVEN)
    place = n[:, None, None] * channels + d[None]
    state_valid = n_valid[:, None, None] & d_valid[None]
    rate = _load_states(A + k * states * channels + place, state_valid)
    bias = tl.load(delta_bias + k * channels + d, mask=d_valid, other=0.0)
    source += base * channels
    delta += base * delta_token + k64 * delta_direction
    matrix += base * matrix_token + k64 * matrix_direction

    begin, end, length, line_stride, stride = _lines(i, chunk, axis, height, width, map_width)
    state = tl.zeros((GROUPS, STATES, CHANNELS), tl.float32)
    total = tl.zeros((TOKENS, GROUPS, CHANNELS), tl.float32)
    line, offset = 0, 0
    position, t_valid = _visit(line, offset, begin, end, length, line_stride, stride, against, TOKENS, EVEN)
    next_raw = _tile(delta, position, delta_token, d, t_valid, d_valid)
    next_x = _tile(source, position, channels, d, t_valid, d_valid)
    next_m = _tile(matrix, position, matrix_token, n, t_valid, n_valid)
    for _ in range((end - begin) * tl.cdiv(length, TOKENS)):
        dt, _ = _time_step(next_raw, bias, t_valid, SOFTPLUS)
        x, m = next_x.to(tl.float32), next_m.to(tl.float32)
        # The next tile's numbers travel while this one is computed.
        line, offset = _next(line, offset, length, TOKENS)
        position, t_valid = _visit(line, offset, begin, end, length, line_stride, stride, against, TOKENS, EVEN)
        next_raw = _tile(delta, position, delta_token, d, t_valid, d_valid)
        next_x = _tile(source, position, channels, d, t_valid, d_valid)
        next_m = _tile(matrix, position, matrix_token, n, t_valid, n_valid)
        decay = tl.exp2(dt[:, :, None, :] * rate[None])
        if ADJOINT:
            drive = x[:, :, None, :] * m[:, None, :, None]
        else:
            drive = (dt * x)[:, :, None, :] * m[:, None, :, None]
            total += dt
        for s in tl.static_range(TOKENS):
            if ADJOINT:  # noqa: SIM108 (a branch of the compilation)
                state = _row(decay, s) * (state + _row(drive, s))
            else:
                state = _row(decay, s) * state + _row(drive, s)

    out = (region.to(tl.int64) * 4 + k) * chunks + i
    _store_states(carries + out * states * channels + place, state, state_valid)
    if not ADJOINT:
        tl.store(time_steps + out * channels + d, tl.sum(total, 0), mask=d_valid)


# --- forward -----------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def _forward_kernel(
    u,
    delta,
    A,
    B,
    C,
    D,
    delta_bias,
    carries,
    time_steps,
    first_y,  # of an axis's first direction, (2, ...)
    y,
    channels,
    states,
    height,
    width,
    map_height,
    map_width,
    positions,  # of all maps
    chunks,
    chunk,
    delta_token,
    delta_direction,
    B_token,
    B_direction,
    C_token,
    C_direction,
    LOCAL: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    EVEN: tl.constexpr,
    TOKENS: tl.constexpr,
    GROUPS: tl.constexpr,
    STATES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """y of both directions along an axis, for one chunk of its lines, added to zeros.

    Two numbers, one of each axis, are added to a zero: in whichever order, the sum is the same.
    """
    i = tl.program_id(1)
    region = tl.program_id(2) // 2
    axis = tl.program_id(2) % 2
    base = _first_position(region, height, width, map_height, map_width, LOCAL)
    d = (tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)[:, None]) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    n = tl.arange(0, STATES)
    d_valid = _below(d, channels, EVEN)
    n_valid = _below(n, states, EVEN)
    state_place = n[:, None, None] * channels + d[None]
    state_valid = n_valid[:, None, None] & d_valid[None]
    u += base * channels
    first_y += (base + axis * positions) * channels
    y += base * channels
    begin, end, length, line_stride, stride = _lines(i, chunk, axis, height, width, map_width)

    for backwards in range(2):
        k = axis + 2 * backwards
        k64 = tl.full((), k, tl.int64)  # a direction may lie far away
        rate = _load_states(A + k * states * channels + state_place, state_valid)
        bias = tl.load(delta_bias + k * channels + d, mask=d_valid, other=0.0)
        skip = tl.load(D + k * channels + d, mask=d_valid, other=0.0)
        delta_k = delta + base * delta_token + k64 * delta_direction
        B_k = B + base * B_token + k64 * B_direction
        C_k = C + base * C_token + k64 * C_direction
        state = _chained(
            carries, time_steps, rate, (region.to(tl.int64) * 4 + k) * chunks, i, chunks, backwards,
            channels, states, state_place, state_valid, d, d_valid,
        )  # fmt: skip
        tl.debug_barrier()  # the second direction reads what the first wrote, maybe with other threads
        line, offset = 0, 0
        position, t_valid = _visit(line, offset, begin, end, length, line_stride, stride, backwards == 1, TOKENS, EVEN)
        next_raw = _tile(delta_k, position, delta_token, d, t_valid, d_valid)
        next_x = _tile(u, position, channels, d, t_valid, d_valid)
        next_b = _tile(B_k, position, B_token, n, t_valid, n_valid)
        next_c = _tile(C_k, position, C_token, n, t_valid, n_valid)
        added = tl.full((TOKENS,), backwards, tl.int32) > 0  # to what the first direction wrote
        next_y = _tile(first_y, position, channels, d, t_valid & added, d_valid)
        for _ in range((end - begin) * tl.cdiv(length, TOKENS)):
            dt, _ = _time_step(next_raw, bias, t_valid, SOFTPLUS)
            x, b, c = next_x.to(tl.float32), next_b.to(tl.float32), next_c.to(tl.float32)
            place = position[:, None, None] * channels + d[None]
            valid = t_valid[:, None, None] & d_valid[None]
            before = next_y
            # The next tile's numbers travel while this one is computed.
            line, offset = _next(line, offset, length, TOKENS)
            position, t_valid = _visit(
                line, offset, begin, end, length, line_stride, stride, backwards == 1, TOKENS, EVEN
            )
            next_raw = _tile(delta_k, position, delta_token, d, t_valid, d_valid)
            next_x = _tile(u, position, channels, d, t_valid, d_valid)
            next_b = _tile(B_k, position, B_token, n, t_valid, n_valid)
            next_c = _tile(C_k, position, C_token, n, t_valid, n_valid)
            next_y = _tile(first_y, position, channels, d, t_valid & added, d_valid)
            decay = tl.exp2(dt[:, :, None, :] * rate[None])
            h = (dt * x)[:, :, None, :] * b[:, None, :, None]  # what drives the states, overwritten by the states
            for s in tl.static_range(TOKENS):
                state = _row(decay, s) * state + _row(h, s)
                h = _set_row(h, s, state)
            both = before + tl.sum(h * c[:, None, :, None], 2) + skip[None] * x
            tl.store(first_y + place, both, mask=valid & (backwards == 0))
            tl.atomic_add(y + place, both, mask=valid & (backwards == 1), sem="relaxed")


# --- backward ----------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def _backward_kernel(
    dy,
    u,
    delta,
    A,
    B,
    C,
    D,
    delta_bias,
    carries,
    adjoint_carries,
    time_steps,
    chunk_tiles,
    starts,  # scratch, (regions, axes, chunks, tiles, N, D): the state before each tile
    first_du,  # of an axis's first direction, (2, ...)
    du,  # added to zeros, as the forward's y
    ddelta,
    dB,
    dC,
    dA,  # (regions, K, chunks, N, D), to be summed over regions and chunks
    dD,  # (regions, K, chunks, D), likewise
    ddelta_bias,
    channels,
    states,
    height,
    width,
    map_height,
    map_width,
    positions,  # of all maps
    chunks,
    chunk,
    delta_token,
    delta_direction,
    B_token,
    B_direction,
    C_token,
    C_direction,
    LOCAL: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    EVEN: tl.constexpr,
    TOKENS: tl.constexpr,
    GROUPS: tl.constexpr,
    STATES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """All gradients of both directions along an axis, for one chunk of its lines."""
    i = tl.program_id(1)
    region = tl.program_id(2) // 2
    axis = tl.program_id(2) % 2
    base = _first_position(region, height, width, map_height, map_width, LOCAL)
    d = (tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)[:, None]) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    n = tl.arange(0, STATES)
    d_valid = _below(d, channels, EVEN)
    n_valid = _below(n, states, EVEN)
    state_place = n[:, None, None] * channels + d[None]
    state_valid = n_valid[:, None, None] & d_valid[None]
    u += base * channels
    dy += base * channels
    first_du += (base + axis * positions) * channels
    du += base * channels
    ddelta += base * delta_token
    dB += base * 4 * states
    dC += base * 4 * states
    begin, end, length, line_stride, stride = _lines(i, chunk, axis, height, width, map_width)
    line_tiles = tl.cdiv(length, TOKENS)
    tiles = (end - begin) * line_tiles
    starts += ((region.to(tl.int64) * 2 + axis) * chunks + i) * chunk_tiles * states * channels + state_place

    for backwards in range(2):
        k = axis + 2 * backwards
        k64 = tl.full((), k, tl.int64)  # a direction may lie far away
        first = (region.to(tl.int64) * 4 + k) * chunks
        rate = _load_states(A + k * states * channels + state_place, state_valid)
        bias = tl.load(delta_bias + k * channels + d, mask=d_valid, other=0.0)
        skip = tl.load(D + k * channels + d, mask=d_valid, other=0.0)
        delta_k = delta + base * delta_token + k64 * delta_direction
        B_k = B + base * B_token + k64 * B_direction
        C_k = C + base * C_token + k64 * C_direction

        # The states once more, to note the one before each tile.
        state = _chained(
            carries, time_steps, rate, first, i, chunks, backwards,
            channels, states, state_place, state_valid, d, d_valid,
        )  # fmt: skip
        line, offset = 0, 0
        position, t_valid = _visit(line, offset, begin, end, length, line_stride, stride, backwards == 1, TOKENS, EVEN)
        next_raw = _tile(delta_k, position, delta_token, d, t_valid, d_valid)
        next_x = _tile(u, position, channels, d, t_valid, d_valid)
        next_b = _tile(B_k, position, B_token, n, t_valid, n_valid)
        for j in range(tiles):
            _store_states(starts + j * states * channels, state, state_valid)
            dt, _ = _time_step(next_raw, bias, t_valid, SOFTPLUS)
            x, b = next_x.to(tl.float32), next_b.to(tl.float32)
            # The next tile's numbers travel while this one is computed.
            line, offset = _next(line, offset, length, TOKENS)
            position, t_valid = _visit(
                line, offset, begin, end, length, line_stride, stride, backwards == 1, TOKENS, EVEN
            )
            next_raw = _tile(delta_k, position, delta_token, d, t_valid, d_valid)
            next_x = _tile(u, position, channels, d, t_valid, d_valid)
            next_b = _tile(B_k, position, B_token, n, t_valid, n_valid)
            decay = tl.exp2(dt[:, :, None, :] * rate[None])
            drive = (dt * x)[:, :, None, :] * b[:, None, :, None]
            for s in tl.static_range(TOKENS):
                state = _row(decay, s) * state + _row(drive, s)

        adjoint = _chained(
            adjoint_carries, time_steps, rate, first, i, chunks, 1 - backwards,
            channels, states, state_place, state_valid, d, d_valid,
        )  # fmt: skip
        rate_gradient = tl.zeros((GROUPS, STATES, CHANNELS), tl.float32)
        skip_gradient = tl.zeros((TOKENS, GROUPS, CHANNELS), tl.float32)
        bias_gradient = tl.zeros((TOKENS, GROUPS, CHANNELS), tl.float32)
        tl.debug_barrier()  # what this program wrote (starts, first_du) is read again, maybe by other threads
        line, offset = end - begin - 1, (line_tiles - 1) * TOKENS
        position, t_valid = _visit(line, offset, begin, end, length, line_stride, stride, backwards == 1, TOKENS, EVEN)
        next_raw = _tile(delta_k, position, delta_token, d, t_valid, d_valid)
        next_x = _tile(u, position, channels, d, t_valid, d_valid)
        next_dy = _tile(dy, position, channels, d, t_valid, d_valid)
        next_b = _tile(B_k, position, B_token, n, t_valid, n_valid)
        next_c = _tile(C_k, position, C_token, n, t_valid, n_valid)
        added = tl.full((TOKENS,), backwards, tl.int32) > 0  # to what the first direction wrote
        next_du = _tile(first_du, position, channels, d, t_valid & added, d_valid)
        next_state = _load_states(starts + tl.maximum(tiles - 1, 0) * states * channels, state_valid)
        for j in range(tiles):
            dt, raw = _time_step(next_raw, bias, t_valid, SOFTPLUS)
            x, dout, state, before = next_x.to(tl.float32), next_dy.to(tl.float32), next_state, next_du
            b, c = next_b.to(tl.float32), next_c.to(tl.float32)
            valid = t_valid[:, None, None] & d_valid[None]
            matrix_valid = t_valid[:, None] & n_valid[None, :]
            place = position[:, None, None] * channels + d[None]
            delta_place = k64 * delta_direction + position[:, None, None] * delta_token + d[None]
            matrix_place = position[:, None] * (4 * states) + k * states + n[None, :]
            # The next tile's numbers travel while this one is computed.
            tile = tl.maximum(tiles - 2 - j, 0)
            turn = tl.where(offset > 0, 0, 1)
            line, offset = line - turn, offset - TOKENS + turn * line_tiles * TOKENS
            position, t_valid = _visit(
                line, offset, begin, end, length, line_stride, stride, backwards == 1, TOKENS, EVEN
            )
            next_raw = _tile(delta_k, position, delta_token, d, t_valid, d_valid)
            next_x = _tile(u, position, channels, d, t_valid, d_valid)
            next_dy = _tile(dy, position, channels, d, t_valid, d_valid)
            next_b = _tile(B_k, position, B_token, n, t_valid, n_valid)
            next_c = _tile(C_k, position, C_token, n, t_valid, n_valid)
            next_du = _tile(first_du, position, channels, d, t_valid & added, d_valid)
            next_state = _load_states(starts + tile * states * channels, state_valid)

            decay = tl.exp2(dt[:, :, None, :] * rate[None])
            # First what drives the states, then, step by step, a_t h_{t-1} in its place.
            kept = (dt * x)[:, :, None, :] * b[:, None, :, None]
            for s in tl.static_range(TOKENS):
                row = _row(decay, s) * state
                state = row + _row(kept, s)
                kept = _set_row(kept, s, row)
            h = kept + (dt * x)[:, :, None, :] * b[:, None, :, None]
            dC_tile = tl.sum(tl.sum(h * dout[:, :, None, :], 1), 2)
            tl.atomic_add(dC + matrix_place, dC_tile, mask=matrix_valid, sem="relaxed")

            g = dout[:, :, None, :] * c[:, None, :, None]  # c_t, completed to g_t below
            for s in tl.static_range(TOKENS):
                row = _row(g, TOKENS - 1 - s) + adjoint
                g = _set_row(g, TOKENS - 1 - s, row)
                adjoint = _row(decay, TOKENS - 1 - s) * row
            dB_tile = tl.sum(tl.sum(g * (dt * x)[:, :, None, :], 1), 2)
            tl.atomic_add(dB + matrix_place, dB_tile, mask=matrix_valid, sem="relaxed")

            exponent = g * kept  # gradient of dt A
            rate_gradient += tl.sum(exponent * dt[:, :, None, :], 0)
            drive_gradient = tl.sum(g * b[:, None, :, None], 2)  # of dt u, (TOKENS, GROUPS, CHANNELS)
            # rate is A in units of log 2.
            dt_gradient = tl.sum(exponent * rate[None], 2) * LOG_2 + drive_gradient * x
            raw_gradient = tl.where(valid, dt_gradient * _softplus_slope(raw, dt, SOFTPLUS), 0.0)
            tl.store(ddelta + delta_place, raw_gradient, mask=valid)
            bias_gradient += raw_gradient
            skip_gradient += dout * x
            both = before + drive_gradient * dt + skip[None] * dout
            tl.store(first_du + place, both, mask=valid & (backwards == 0))
            tl.atomic_add(du + place, both, mask=valid & (backwards == 1), sem="relaxed")

        _store_states(dA + (first + i) * states * channels + state_place, rate_gradient, state_valid)
        tl.store(dD + (first + i) * channels + d, tl.sum(skip_gradient, 0), mask=d_valid)
        tl.store(ddelta_bias + (first + i) * channels + d, tl.sum(bias_gradient, 0), mask=d_valid)


# --- launches ----------------------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """What a kernel computes at once, by one warp.

    Args:
        tokens: steps of the recurrence, in a thread's registers.
        channels: channels across a warp's lanes; the lanes left over share the states.
        groups: so many times that number of channels, in a thread's registers.
        registers: limit of registers a thread, where the compiler would take a few more than fit `PROGRAMS` warps.
    """

    tokens: int
    channels: int
    groups: int = 1
    registers: int | None = None

    def blocks(self, channels: int) -> int:
        return triton.cdiv(channels, self.channels * self.groups)

    def constants(self) -> dict[str, int | None]:
        return {
            "TOKENS": self.tokens, "GROUPS": self.groups, "CHANNELS": self.channels,
            "num_warps": 1, "maxnreg": self.registers,
        }  # fmt: skip


# Measured on an H200 (docs/performance.md). CARRY is by bytes of a number of u: 8 channels of 2 bytes would leave half
# of each 32-byte sector unused.
CARRY = {4: Tile(8, 8), 2: Tile(4, 32)}
FORWARD = Tile(4, 32, registers=168)
BACKWARD = Tile(4, 8, 2)
# Programs (of one warp each) of the forward kernel that there shall be for each multiprocessor. Where a backward pass
# follows, which takes over the chunks, 8 of them: its blocks of channels are half as large, and of these 16 programs a
# multiprocessor holds 8 at once, by their registers: two whole waves.
PROGRAMS, TRAINING_PROGRAMS = 12, 8


class _Launch:
    """How a scan is cut, and the kernels' arguments that say so.

    Args:
        u, A, local: as in :func:`forward`.
        softplus: whether `delta` is given before softplus.
        training: whether a backward pass follows, for which it is cut then.
        chunks: as many as an earlier launch of these sizes had.
    """

    def __init__(
        self,
        u: Tensor,
        A: Tensor,
        local: bool,
        softplus: bool = True,
        training: bool = False,
        chunks: int | None = None,
    ) -> None:
        batch, map_height, map_width, channels = u.shape
        height, width = (map_height // 2, map_width // 2) if local else (map_height, map_width)
        self.states = A.shape[2]
        self.channels = channels
        self.regions = 4 * batch if local else batch
        if chunks is None:
            processors = torch.cuda.get_device_properties(u.device).multi_processor_count if u.is_cuda else 4
            programs = processors * (TRAINING_PROGRAMS if training else PROGRAMS)
            chunks = max(1, round(programs / (2 * self.regions * FORWARD.blocks(channels))))
        self.longest = max(height, width)
        self.chunk = triton.cdiv(self.longest, chunks)  # lines of a chunk
        self.chunks = triton.cdiv(self.longest, self.chunk)
        self.sizes = (channels, self.states, height, width, map_height, map_width)
        self.sizes += (batch * map_height * map_width, self.chunks, self.chunk)
        self.constants = {"LOCAL": local, "SOFTPLUS": softplus, "STATES": triton.next_power_of_2(self.states)}

    def even(self, tile: Tile) -> bool:
        """Whether such tiles fill every line, the channels and the states, so that nothing needs a mask."""
        channels, states, height, width = self.sizes[:4]
        sizes = ((height, tile.tokens), (width, tile.tokens), (channels, tile.channels * tile.groups))
        return states == self.constants["STATES"] and all(size % part == 0 for size, part in sizes)

    def constants_of(self, tile: Tile) -> dict[str, Any]:
        return {**tile.constants(), **self.constants, "EVEN": self.even(tile)}

    def zeros_per_chunk(self, like: Tensor, *shape: int) -> Tensor:
        return like.new_zeros(self.regions, 4, self.chunks, *shape, dtype=torch.float32)

    def carry(self, *pointers: Any, strides: tuple[int, ...], adjoint: bool) -> None:
        if self.chunks > 1:
            tile = CARRY[pointers[0].dtype.itemsize]
            grid = (tile.blocks(self.channels), self.chunks - 1, 4 * self.regions)
            _carry_kernel[grid](*pointers, *self.sizes, *strides, ADJOINT=adjoint, **self.constants_of(tile))

    def both_axes(self, kernel: Any, tile: Tile, *pointers: Any, strides: tuple[int, ...]) -> None:
        grid = (tile.blocks(self.channels), self.chunks, 2 * self.regions)
        kernel[grid](*pointers, *self.sizes, *strides, **self.constants_of(tile))


def per_token(name: str, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """A tensor (B, H, W, K, .) whose positions follow each other evenly, and its strides of token and direction."""
    b, h, w, k, c = x.shape
    token, direction = x.stride(2), x.stride(3)
    if x.stride(4) != 1 or x.stride(1) != w * token or (b > 1 and x.stride(0) != h * w * token):
        # Strides of axes of one element say nothing, also afterwards.
        x, token, direction = x.contiguous(), k * c, c
    if h * w * token >= 2**31:
        raise ValueError(f"{name}: found {h * w * token} numbers an image, expected fewer than 2^31 (32-bit positions)")
    return x, (token, direction)


def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor | None,
    local: bool,
    training: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """y `(B, H, W, D)` in float32; and, for the backward, what each chunk adds and its sum of time steps.

    Arguments as in :func:`glmamba_monai.ops.ss2d_scan`; the sequences float32, float16 or bfloat16. Without
    `delta_bias`, `delta` is the time step itself, after softplus. `training` chooses the chunks that are faster if a
    backward pass follows; it may follow without, too.
    """
    launch = _Launch(u, A, local, delta_bias is not None, training)
    u = u.contiguous()
    (delta, delta_strides), (B, B_strides), (C, C_strides) = (
        per_token("delta", delta),
        per_token("B", B),
        per_token("C", C),
    )
    rate = (A.float() * LOG2_E.value).transpose(1, 2).contiguous()
    D = D.float().contiguous()
    delta_bias = D if delta_bias is None else delta_bias.float().contiguous()  # D: any pointer, none is read
    first_y = torch.empty((2, *u.shape), dtype=torch.float32, device=u.device)
    y = torch.zeros(u.shape, dtype=torch.float32, device=u.device)
    carries = launch.zeros_per_chunk(u, launch.states, launch.channels)
    time_steps = launch.zeros_per_chunk(u, launch.channels)
    with torch.cuda.device_of(u):
        launch.carry(
            u, delta, B, rate, delta_bias, carries, time_steps, strides=(*delta_strides, *B_strides), adjoint=False
        )
        launch.both_axes(
            _forward_kernel,
            FORWARD,
            *(u, delta, rate, B, C, D, delta_bias, carries, time_steps, first_y, y),
            strides=(*delta_strides, *B_strides, *C_strides),
        )
    return y, carries, time_steps


def backward(
    dy: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor | None,
    local: bool,
    carries: Tensor,
    time_steps: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of `forward` in the order of its tensors; float32, but `delta`'s in the dtype of `delta`.

    Those of `B` and `C` are summed atomically, so their last bits may differ between runs. Those of `delta` and
    `delta_bias` are of what softplus is applied to, whether `delta` is given before softplus or after.
    """
    launch = _Launch(u, A, local, delta_bias is not None, chunks=carries.shape[2])
    u, dy = u.contiguous(), dy.contiguous()
    (delta, delta_strides), (B, B_strides), (C, C_strides) = (
        per_token("delta", delta),
        per_token("B", B),
        per_token("C", C),
    )
    rate = (A.float() * LOG2_E.value).transpose(1, 2).contiguous()
    D = D.float().contiguous()
    delta_bias = D if delta_bias is None else delta_bias.float().contiguous()  # D: any pointer, none is read
    tiles = launch.chunk * triton.cdiv(launch.longest, BACKWARD.tokens)
    adjoint_carries = torch.zeros_like(carries)
    starts = u.new_empty((launch.regions, 2, launch.chunks, tiles, *carries.shape[3:]), dtype=torch.float32)
    first_du = torch.empty((2, *u.shape), dtype=torch.float32, device=u.device)
    du = torch.zeros(u.shape, dtype=torch.float32, device=u.device)
    _, height, width, _, _ = delta.shape
    token, direction = delta_strides
    strides = (height * width * token, width * token, token, direction, 1)
    ddelta = torch.empty_strided(delta.shape, strides, dtype=delta.dtype, device=u.device)
    dB, dC = (torch.zeros(B.shape, dtype=torch.float32, device=u.device) for _ in range(2))
    dA, dD, dbias = torch.empty_like(carries), torch.empty_like(time_steps), torch.empty_like(time_steps)
    with torch.cuda.device_of(u):
        launch.carry(
            *(dy, delta, C, rate, delta_bias, adjoint_carries, time_steps),
            strides=(*delta_strides, *C_strides),
            adjoint=True,
        )
        launch.both_axes(
            _backward_kernel,
            BACKWARD,
            *(dy, u, delta, rate, B, C, D, delta_bias, carries, adjoint_carries, time_steps, tiles, starts),
            *(first_du, du, ddelta, dB, dC, dA, dD, dbias),
            strides=(*delta_strides, *B_strides, *C_strides),
        )
    return du, ddelta, dA.sum((0, 2)).transpose(1, 2), dB, dC, dD.sum((0, 2)), dbias.sum((0, 2))
