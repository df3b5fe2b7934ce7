"""GLMamba's fusion of two feature maps as Triton kernels (CUDA): each pass reads the maps twice and keeps none between.

A tile is some pixels of one image, `(ROWS, CHANNELS)`, channels contiguous. The programs of an image walk over its
tiles; each keeps maxima or sums in registers, and what the few programs found is put together afterwards.

Notation: x and y for the low-resolution and the reference map, `difference = x - y`, `similarity = x y`, and with the
low-resolution map's share s of a pixel `complement = s x + (1 - s) y`, written as `y + s difference`.
"""

# ruff: noqa: ANN001, ANN202 (types of the kernels' arguments are Triton's)

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["fuse_modalities_backward", "fuse_modalities_forward"]

TILE = 1024  # numbers of a tile: 8 pixels of 128 channels
PROGRAMS_PER_PROCESSOR = 4  # which the registers of the largest kernel allow; each leaves one row of maxima or sums
STAGES = tl.constexpr(3)  # the next tiles' numbers travel while a tile is computed


@triton.jit
def _pixels(tile, image, pixels, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Pixels of a tile in their image (ROWS, 1), 64-bit places in a map, and which numbers of the tile there are."""
    pixel = tile * ROWS + tl.arange(0, ROWS)[:, None]
    d = tl.arange(0, CHANNELS)[None, :]
    return pixel, (image.to(tl.int64) * pixels + pixel) * channels + d, (pixel < pixels) & (d < channels)


@triton.jit
def _share_weights(weight, bias, channels, CHANNELS: tl.constexpr):
    """By what the logit of x's share exceeds that of y's, per x, per y and at zero: a softmax over two is a sigmoid."""
    d = tl.arange(0, CHANNELS)
    there = d < channels
    wx = tl.load(weight + d, mask=there, other=0.0) - tl.load(weight + 2 * channels + d, mask=there, other=0.0)
    weight += channels
    wy = tl.load(weight + d, mask=there, other=0.0) - tl.load(weight + 2 * channels + d, mask=there, other=0.0)
    return wx[None, :], wy[None, :], tl.load(bias) - tl.load(bias + 1)


@triton.jit
def _parts(low_resolution, reference, place, valid, wx, wy, b):
    """x, y, x's share (ROWS, 1), difference, similarity and complement of a tile."""
    x = tl.load(low_resolution + place, mask=valid, other=0.0).to(tl.float32)
    y = tl.load(reference + place, mask=valid, other=0.0).to(tl.float32)
    share = tl.sigmoid(tl.sum(x * wx + y * wy, 1) + b)[:, None]
    return x, y, share, x - y, x * y, y + share * (x - y)


@triton.jit
def _mixture(mixture, image):
    mixture += image * 3
    return tl.load(mixture), tl.load(mixture + 1), tl.load(mixture + 2)


@triton.jit
def _raise(highest, where, values, tile, valid):
    """The greater of `highest` and the tile's values, and the tile it is from; the earlier one where they are equal."""
    higher = valid & (values > highest)
    return tl.where(higher, values, highest), tl.where(higher, tile, where)


@triton.jit
def _store_highest(maxima, positions, highest, where, pixels, channels):
    """The maximum of each channel and the first pixel that has it."""
    top = tl.max(highest, 0)
    pixel = where * highest.shape[0] + tl.arange(0, highest.shape[0])[:, None]
    first = tl.min(tl.where(highest == top[None, :], pixel, pixels), 0)
    d = tl.arange(0, highest.shape[1])
    tl.store(maxima + d, top, mask=d < channels)
    tl.store(positions + d, first, mask=d < channels)


@triton.jit
def _peaks(dpooled, positions, d, channels):
    """The gradients of a map's maxima and the pixels that they belong to."""
    gradient = tl.load(dpooled + d, mask=d < channels, other=0.0)
    return gradient[None, :], tl.load(positions + d, mask=d < channels, other=-1)[None, :]


@triton.jit
def _pool_kernel(
    low_resolution, reference, weight, bias, maxima, positions, pixels, channels, programs,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """A program's maxima of the three maps and their positions."""
    image, program = tl.program_id(0) // programs, tl.program_id(0) % programs
    wx, wy, b = _share_weights(weight, bias, channels, CHANNELS)
    top_difference = tl.full((ROWS, CHANNELS), float("-inf"), tl.float32)
    top_similarity, top_complement = top_difference, top_difference
    at_difference = tl.zeros((ROWS, CHANNELS), tl.int32)
    at_similarity, at_complement = at_difference, at_difference
    for tile in tl.range(program, tl.cdiv(pixels, ROWS), programs, num_stages=STAGES):
        _, place, valid = _pixels(tile, image, pixels, channels, ROWS, CHANNELS)
        _, _, _, difference, similarity, complement = _parts(low_resolution, reference, place, valid, wx, wy, b)
        top_difference, at_difference = _raise(top_difference, at_difference, difference, tile, valid)
        top_similarity, at_similarity = _raise(top_similarity, at_similarity, similarity, tile, valid)
        top_complement, at_complement = _raise(top_complement, at_complement, complement, tile, valid)
    found = tl.program_id(0) * 3 * channels
    _store_highest(maxima + found, positions + found, top_difference, at_difference, pixels, channels)
    found += channels
    _store_highest(maxima + found, positions + found, top_similarity, at_similarity, pixels, channels)
    found += channels
    _store_highest(maxima + found, positions + found, top_complement, at_complement, pixels, channels)


@triton.jit
def _mix_kernel(
    low_resolution, reference, weight, bias, mixture, out, pixels, channels, programs,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The weighted sum of the three maps."""
    image, program = tl.program_id(0) // programs, tl.program_id(0) % programs
    wx, wy, b = _share_weights(weight, bias, channels, CHANNELS)
    m0, m1, m2 = _mixture(mixture, image)
    for tile in tl.range(program, tl.cdiv(pixels, ROWS), programs, num_stages=STAGES):
        _, place, valid = _pixels(tile, image, pixels, channels, ROWS, CHANNELS)
        _, _, _, difference, similarity, complement = _parts(low_resolution, reference, place, valid, wx, wy, b)
        tl.store(out + place, m0 * difference + m1 * similarity + m2 * complement, mask=valid)


@triton.jit
def _mixture_backward_kernel(
    dout, low_resolution, reference, weight, bias, dmixture, pixels, channels, programs,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """A program's sums of `dout` times each of the three maps."""
    image, program = tl.program_id(0) // programs, tl.program_id(0) % programs
    wx, wy, b = _share_weights(weight, bias, channels, CHANNELS)
    sum_difference = tl.zeros((ROWS, CHANNELS), tl.float32)
    sum_similarity, sum_complement = sum_difference, sum_difference
    for tile in tl.range(program, tl.cdiv(pixels, ROWS), programs, num_stages=STAGES):
        _, place, valid = _pixels(tile, image, pixels, channels, ROWS, CHANNELS)
        _, _, _, difference, similarity, complement = _parts(low_resolution, reference, place, valid, wx, wy, b)
        g = tl.load(dout + place, mask=valid, other=0.0).to(tl.float32)
        sum_difference += g * difference
        sum_similarity += g * similarity
        sum_complement += g * complement
    dmixture += tl.program_id(0) * 3
    tl.store(dmixture, tl.sum(sum_difference))
    tl.store(dmixture + 1, tl.sum(sum_similarity))
    tl.store(dmixture + 2, tl.sum(sum_complement))


@triton.jit
def _maps_backward_kernel(
    dout, low_resolution, reference, weight, bias, mixture, dpooled, positions, dlow_resolution, dreference,
    dweight, dbias, pixels, channels, programs, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Gradients of the maps, and a program's sums for the weights of the shares.

    The gradient of a maximum joins that of its map at the maximum's position.
    """
    image, program = tl.program_id(0) // programs, tl.program_id(0) % programs
    d = tl.arange(0, CHANNELS)
    wx, wy, b = _share_weights(weight, bias, channels, CHANNELS)
    m0, m1, m2 = _mixture(mixture, image)
    peak = image * 3 * channels
    peak_difference, at_difference = _peaks(dpooled + peak, positions + peak, d, channels)
    peak += channels
    peak_similarity, at_similarity = _peaks(dpooled + peak, positions + peak, d, channels)
    peak += channels
    peak_complement, at_complement = _peaks(dpooled + peak, positions + peak, d, channels)
    dwx = tl.zeros((ROWS, CHANNELS), tl.float32)
    dwy = tl.zeros((ROWS, CHANNELS), tl.float32)
    db = tl.zeros((ROWS, 1), tl.float32)
    for tile in tl.range(program, tl.cdiv(pixels, ROWS), programs, num_stages=STAGES):
        pixel, place, valid = _pixels(tile, image, pixels, channels, ROWS, CHANNELS)
        x, y, share, difference, _, _ = _parts(low_resolution, reference, place, valid, wx, wy, b)
        g = tl.load(dout + place, mask=valid, other=0.0).to(tl.float32)
        ddifference = m0 * g + tl.where(at_difference == pixel, peak_difference, 0.0)
        dsimilarity = m1 * g + tl.where(at_similarity == pixel, peak_similarity, 0.0)
        dcomplement = m2 * g + tl.where(at_complement == pixel, peak_complement, 0.0)
        dlogit = tl.sum(dcomplement * difference, 1)[:, None] * share * (1.0 - share)
        dwx += dlogit * x
        dwy += dlogit * y
        db += dlogit
        ddifference += share * dcomplement  # complement = y + share difference
        tl.store(dlow_resolution + place, ddifference + dsimilarity * y + dlogit * wx, mask=valid)
        tl.store(dreference + place, dcomplement - ddifference + dsimilarity * x + dlogit * wy, mask=valid)
    dweight += tl.program_id(0) * 2 * channels
    tl.store(dweight + d, tl.sum(dwx, 0), mask=d < channels)
    tl.store(dweight + channels + d, tl.sum(dwy, 0), mask=d < channels)
    tl.store(dbias + tl.program_id(0), tl.sum(db))


# --- launches ----------------------------------------------------------------------------------------------------


class _Launch:
    """How the maps are cut, and the kernels' arguments that say so."""

    def __init__(self, maps: Tensor) -> None:
        self.batch, height, width, self.channels = maps.shape
        self.pixels = height * width
        columns = triton.next_power_of_2(self.channels)
        rows = max(1, TILE // columns)
        self.constants = {"ROWS": rows, "CHANNELS": columns, "num_warps": 4}
        processors = torch.cuda.get_device_properties(maps.device).multi_processor_count if maps.is_cuda else 1
        programs = PROGRAMS_PER_PROCESSOR * processors // max(1, self.batch)
        self.programs = max(1, min(triton.cdiv(self.pixels, rows), programs))  # of an image

    def __call__(self, kernel: triton.JITFunction, *tensors: Tensor) -> None:
        if self.batch:
            with torch.cuda.device_of(tensors[0]):
                sizes = (self.pixels, self.channels, self.programs)
                kernel[(self.batch * self.programs,)](*tensors, *sizes, **self.constants)


def fuse_modalities_forward(
    low_resolution: Tensor,
    reference: Tensor,
    complement_weight: Tensor,
    complement_bias: Tensor,
    mixture_weight: Tensor,
    mixture_bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`glmamba_monai.ops.fuse_modalities`.

    Returns:
        The result; the maxima `(B, 3C)` and the first pixel that has each; the mixture `(B, 3)`.
    """
    launch = _Launch(low_resolution)
    maps = (low_resolution.contiguous(), reference.contiguous())
    shares = (complement_weight.float().contiguous(), complement_bias.float().contiguous())
    maxima = maps[0].new_empty((launch.batch, launch.programs, 3 * launch.channels), dtype=torch.float32)
    positions = torch.empty_like(maxima, dtype=torch.int32)
    launch(_pool_kernel, *maps, *shares, maxima, positions)
    pooled = maxima.amax(1)
    positions = torch.where(maxima == pooled[:, None], positions, launch.pixels).amin(1)
    # Not as a matrix product, which autocast and tf32 would round.
    mixture = torch.softmax((pooled[:, None] * mixture_weight.float()).sum(2) + mixture_bias.float(), 1)
    out = torch.empty_like(maps[0])
    launch(_mix_kernel, *maps, *shares, mixture, out)
    return out, pooled, positions, mixture


def fuse_modalities_backward(
    dout: Tensor,
    low_resolution: Tensor,
    reference: Tensor,
    complement_weight: Tensor,
    complement_bias: Tensor,
    mixture_weight: Tensor,
    pooled: Tensor,
    positions: Tensor,
    mixture: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the maps, and of weight and bias of the complement and of the mixture."""
    launch = _Launch(low_resolution)
    maps = (dout.contiguous(), low_resolution.contiguous(), reference.contiguous())
    shares = (complement_weight.float().contiguous(), complement_bias.float().contiguous())
    dmixture = pooled.new_empty((launch.batch, launch.programs, 3))
    launch(_mixture_backward_kernel, *maps, *shares, dmixture)
    dmixture = dmixture.sum(1)
    dlogits = mixture * (dmixture - (mixture * dmixture).sum(1, keepdim=True))
    dpooled = (dlogits[:, :, None] * mixture_weight.float()).sum(1)
    dmaps = (torch.empty_like(maps[1]), torch.empty_like(maps[2]))
    dweight = pooled.new_empty((launch.batch * launch.programs, 2 * launch.channels))
    dbias = pooled.new_empty((launch.batch * launch.programs, 1))
    launch(_maps_backward_kernel, *maps, *shares, mixture, dpooled, positions, *dmaps, dweight, dbias)
    dweight, dbias = dweight.sum(0), dbias.sum(0)  # for the first logit; for the second the opposite
    return (
        *dmaps,
        torch.stack((dweight, -dweight)).to(complement_weight.dtype),
        torch.cat((dbias, -dbias)).to(complement_bias.dtype),
        (dlogits[:, :, None] * pooled[:, None]).sum(0).to(mixture_weight.dtype),
        dlogits.sum(0).to(mixture_weight.dtype),
    )
