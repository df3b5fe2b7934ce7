"""Low-resolution MRI by cropping k-space, the way back onto the high-resolution grid, and data consistency.

Symbols: N matrix size on the high-resolution (HR) grid, n on the low-resolution (LR) grid, r = N / n the
effective factor, f an integer spatial frequency in cycles per field of view.

All transforms keep the field of view, so the centre of LR pixel i lies at the HR position r i + (r - 1) / 2.
A spectrum that is only cropped samples the image at r i: the LR image is shifted by (r - 1) / 2 HR pixels
against every tool that works with affines. The phase ramp exp(2 pi i f (r - 1) / (2 N)) moves the samples to
the pixel centres (docs/method.md).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Hashable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.data import MetaTensor
from monai.transforms import MapTransform, Transform
from monai.utils import TransformBackends, convert_to_tensor, ensure_tuple
from torch import Tensor
from torch.nn import functional as F

from glmamba_monai.transforms.grid import low_resolution_size, require_same_grid

__all__ = [
    "KSpaceDataConsistency",
    "KSpaceDataConsistencyd",
    "KSpaceLowResolution",
    "KSpaceLowResolutiond",
    "KSpaceUpsample",
    "KSpaceUpsampled",
    "RequireKSpaceCropd",
]


def _as_real_tensor(img: NdarrayOrTensor) -> Tensor:
    """``img`` as a plain float32 (or float64) tensor; refuses what is no channel-first real image."""
    x = convert_to_tensor(img, track_meta=False)
    if x.is_complex():
        raise TypeError(f"img must be a real magnitude image, got dtype {x.dtype}.")
    if x.ndim not in (3, 4):
        raise ValueError(
            f"img must be channel-first with 2 or 3 spatial axes, (C, X, Y) or (C, X, Y, S), "
            f"got shape {tuple(x.shape)}."
        )
    return x if x.dtype == torch.float64 else x.float()


def _with_meta(result: Tensor, img: NdarrayOrTensor, factors: Sequence[float]) -> Tensor:
    """``result`` with the meta of ``img``, if any, on pixels ``factors`` as large; same field of view."""
    if not isinstance(img, MetaTensor):
        return result
    out = MetaTensor(result).copy_meta_from(img)
    out.affine = _rescaled(img.affine, factors)
    return out


def _rescaled(affine: Tensor, factors: Sequence[float]) -> Tensor:
    """The affine of pixels ``factors`` as large over the same field of view."""
    grid = torch.eye(affine.shape[-1], dtype=affine.dtype)
    for axis, factor in enumerate(factors):
        grid[axis, axis] = factor
        grid[axis, -1] = (factor - 1) / 2
    return affine @ grid


def _phase_ramp(frequencies: Tensor, full: int, factor: float, like: Tensor, axis: int) -> Tensor:
    """exp(2 pi i f (r - 1) / (2 N)) with r = ``factor``, N = ``full``; shaped for ``like`` along ``axis``."""
    angle = math.pi * (factor - 1) / full * frequencies.double()
    ramp = torch.polar(torch.ones_like(angle), angle).to(like.dtype)
    return ramp.reshape([-1 if a == axis else 1 for a in range(like.ndim)])


def _kept_frequencies(n: int, device: torch.device) -> Tensor:
    """The central ``n`` frequencies in FFT order.

    For even n they are -n/2 .. n/2 - 1, as in a scanner's matrix: -n/2 has no twin, so that an image made of them has a
    small imaginary part.
    """
    return torch.fft.ifftshift(torch.arange(n, device=device) - n // 2)


def _changed_axes(low: Sequence[int], full: Sequence[int]) -> list[int]:
    """The axes along which two shapes differ."""
    return [axis for axis, (n, size) in enumerate(zip(low, full)) if n != size]


def _cropped_spectrum(x: Tensor, low: Sequence[int], ramp: bool = True) -> Tensor:
    """Spectrum of ``x`` on as many frequencies as ``low`` has; ``ramp`` moves the samples onto LR pixel centres."""
    k = x
    for axis in _changed_axes(low, x.shape):  # cropped axis by axis: the next transform has less to do
        size, n = x.shape[axis], low[axis]
        frequencies = _kept_frequencies(n, x.device)
        k = torch.fft.fft(k, dim=axis).index_select(axis, frequencies % size)
        if ramp:
            k = k * _phase_ramp(frequencies, size, size / n, k, axis)
    return k


def _placed_spectrum(k: Tensor, full: Sequence[int]) -> Tensor:
    """The kept frequencies ``k`` in an otherwise empty spectrum of the shape ``full``."""
    for axis in _changed_axes(k.shape, full):
        kept = _kept_frequencies(k.shape[axis], k.device)
        shape = (*k.shape[:axis], full[axis], *k.shape[axis + 1 :])
        k = k.new_zeros(shape).index_copy(axis, kept % full[axis], k)
    return k


class KSpaceLowResolution(Transform):
    """
    Low-resolution image as a scanner would give it: the centre of k-space (docs/data.md, preprocessing).

    Along every axis with a factor above 1: Fourier transform, keep the central ``n = ceil(N / scale)``
    frequencies, multiply by the phase ramp that puts the LR samples onto LR pixel centres, add noise,
    transform back with amplitudes kept, take the magnitude. The affine of a ``MetaTensor`` is set to the LR
    grid over the same field of view; its other meta is copied.

    Args:
        scale: factor, finite and >= 1, integer or not. One number applies to the first two spatial axes (in
            plane), two numbers to one of them each; three give one factor per spatial axis. An axis with
            factor 1 is not transformed.
        mode: ``"crop"`` returns the LR matrix; ``"zero_fill"`` puts the kept frequencies into an empty
            spectrum of the HR matrix (no ramp) and returns an image of unchanged size and affine.
        noise_std: standard deviation of the real and of the imaginary part of complex Gaussian noise, in
            intensity units of the returned image. It is added to the kept k-space samples, so the magnitude
            is Rician.
        seed: seed of the noise. It is combined with a checksum of the image: the same image always gets the
            same noise, so the result may be cached, while no noise pattern recurs from image to image, which
            a network would learn.

    Raises:
        ValueError: a factor below 1 or not finite, an unknown mode, a negative noise_std; when called, a
            sequence whose length is not the number of spatial axes, or an image without 2 or 3 spatial axes.
        TypeError: when called with a complex image.

    Example::

        low = KSpaceLowResolution(scale=2)(high)  # (1, 240, 240, 155) -> (1, 120, 120, 155)
    """

    backend = (TransformBackends.TORCH,)

    def __init__(
        self, scale: float | Sequence[float], mode: str = "crop", noise_std: float = 0.0, seed: int = 0
    ) -> None:
        factors = (scale,) if isinstance(scale, Real) else tuple(scale) if isinstance(scale, Iterable) else ()
        if not factors or not all(isinstance(s, Real) and math.isfinite(s) and s >= 1 for s in factors):
            raise ValueError(f"scale must be a finite number >= 1, or one per spatial axis, got {scale!r}.")
        if mode not in ("crop", "zero_fill"):
            raise ValueError(f"mode must be 'crop' or 'zero_fill', got {mode!r}.")
        if not (math.isfinite(noise_std) and noise_std >= 0):
            raise ValueError(f"noise_std must be finite and >= 0, got {noise_std!r}.")
        self.scale = factors[0] if isinstance(scale, Real) else factors
        self.mode = mode
        self.noise_std = noise_std
        self.seed = seed

    def __call__(self, img: NdarrayOrTensor) -> Tensor:
        """
        Args:
            img: real image, ``(C, X, Y)`` or ``(C, X, Y, S)`` with the slices last; array, tensor or
                ``MetaTensor``.

        Returns:
            Magnitude image, ``(C, ceil(X / s), ceil(Y / s)[, S])`` for ``"crop"``, the shape of ``img`` for
            ``"zero_fill"``; float64 if ``img`` is, else float32; a ``MetaTensor`` if ``img`` is one.
        """
        x = _as_real_tensor(img)
        full = x.shape
        low = (x.shape[0], *self._matrix(tuple(full[1:])))
        axes = _changed_axes(low, full)
        k = _cropped_spectrum(x, low, ramp=self.mode == "crop")
        pixels = math.prod(full[axis] for axis in axes)
        if self.noise_std > 0:
            # in both modes an image pixel is the sum of prod(n) samples divided by prod(N)
            samples = math.prod(low[axis] for axis in axes)
            k = k + self.noise_std * pixels / math.sqrt(samples) * self._unit_noise(k, x)
        factors = [size / n for size, n in zip(full[1:], low[1:])]
        if self.mode == "zero_fill":
            factors = [1.0] * len(factors)
            k = _placed_spectrum(k, full)
        if axes:
            k = torch.fft.ifftn(k, dim=axes, norm="forward") / pixels
        return _with_meta(k.abs(), img, factors)

    def _matrix(self, full: Sequence[int]) -> list[int]:
        """LR matrix for the HR matrix ``full``."""
        scale = (self.scale, self.scale) if isinstance(self.scale, Real) else self.scale
        if len(scale) == 2:
            scale = (*scale, 1)[: len(full)]
        if len(scale) != len(full):
            raise ValueError(f"scale must have one factor per spatial axis of img {full}, got {scale}.")
        return [low_resolution_size(size, s) for size, s in zip(full, scale)]

    def _unit_noise(self, k: Tensor, x: Tensor) -> Tensor:
        """Noise shaped like ``k``, both parts of variance 1; drawn on the CPU, so equal on all devices."""
        checksum = zlib.crc32(x.detach().cpu().contiguous().numpy())
        generator = torch.Generator().manual_seed(self.seed + checksum)
        noise = torch.randn((*k.shape, 2), generator=generator, dtype=x.dtype)
        return torch.view_as_complex(noise).to(k.device)


class KSpaceUpsample(Transform):
    """
    Low-resolution image on the high-resolution matrix over the same field of view (docs/method.md).

    Args:
        mode: ``"zero_fill"``, sinc interpolation: the spectrum is extended by zeros and the inverse phase
            ramp of :py:class:`KSpaceLowResolution` is applied; the result is real and may undershoot zero,
            because a magnitude would make the operation nonlinear and not invertible. ``"bicubic"``: the
            usual cubic convolution, slice by slice over the first two spatial axes.

    Raises:
        ValueError: an unknown mode; when called, a spatial_size of the wrong length or smaller than the
            image, a new slice count with ``"bicubic"``, or an image without 2 or 3 spatial axes.
        TypeError: when called with a complex image.

    Example::

        up = KSpaceUpsample()(low, spatial_size=(240, 240, 155))  # (1, 120, 120, 155) -> (1, 240, 240, 155)
    """

    backend = (TransformBackends.TORCH,)

    def __init__(self, mode: str = "zero_fill") -> None:
        if mode not in ("zero_fill", "bicubic"):
            raise ValueError(f"mode must be 'zero_fill' or 'bicubic', got {mode!r}.")
        self.mode = mode

    def __call__(self, img: NdarrayOrTensor, spatial_size: Sequence[int]) -> Tensor:
        """
        Args:
            img: real image, ``(C, X, Y)`` or ``(C, X, Y, S)`` with the slices last; array, tensor or
                ``MetaTensor``.
            spatial_size: HR matrix, one size per spatial axis. An axis whose size does not change is left
                alone.

        Returns:
            Image of shape ``(C, *spatial_size)``; float64 if ``img`` is, else float32; a ``MetaTensor`` with
            the affine of the HR grid if ``img`` is one.
        """
        # The last bits of an FFT depend on the memory layout; an LR read from a file shall give those of training.
        x = _as_real_tensor(img).contiguous()
        low, full = tuple(x.shape[1:]), tuple(int(size) for size in spatial_size)
        if len(full) != len(low):
            raise ValueError(f"spatial_size must have one entry per spatial axis of img {low}, got {full}.")
        if any(size < n for size, n in zip(full, low)):
            raise ValueError(f"spatial_size must not be smaller than img {low}, got {full}.")
        if self.mode == "bicubic":
            x = _bicubic(x, full)
        else:
            for axis, size in enumerate(full, start=1):
                x = _zero_fill(x, axis, size)
        return _with_meta(x, img, [n / size for n, size in zip(low, full)])


def _zero_fill(x: Tensor, axis: int, size: int) -> Tensor:
    """Sinc interpolation of ``x`` to ``size`` pixels along ``axis``."""
    n = x.shape[axis]
    if n == size:
        return x
    spectrum = torch.fft.rfft(x, dim=axis)
    frequencies = torch.arange(n // 2 + 1, device=x.device)
    spectrum = spectrum * _phase_ramp(frequencies, size, size / n, spectrum, axis).conj()
    if n % 2 == 0:
        # -n/2 and +n/2 are one sample at size n, but two at the larger size. They share it, which is also the
        # real part of leaving all of it at -n/2.
        spectrum.select(axis, n // 2).mul_(0.5)
    return torch.fft.irfft(spectrum, n=size, dim=axis) * (size / n)  # irfft appends the zeros


def _bicubic(x: Tensor, full: tuple[int, ...]) -> Tensor:
    """Cubic convolution of ``(C, X, Y[, S])`` to ``(C, *full)`` in plane."""
    if full[2:] != tuple(x.shape[3:]):
        raise ValueError(f"spatial_size must keep the {x.shape[3]} slices of img with mode 'bicubic', got {full}.")
    slices_first = x.movedim(-1, 0) if x.ndim == 4 else x[None]  # (S, C, X, Y)
    up = F.interpolate(slices_first, size=full[:2], mode="bicubic", align_corners=False)
    return up.movedim(0, -1) if x.ndim == 4 else up[0]


class KSpaceDataConsistency(Transform):
    """
    Data consistency: the measured low frequencies in place of those of a super-resolved image (docs/data.md).

    Afterwards :py:class:`KSpaceLowResolution` gives the low-resolution image again; frequencies that it does not keep
    stay as they are, and so does an image that gave the low-resolution image before.

    What is measured is a magnitude: of the low-resolution pixels that the image gives, complex for an even matrix
    (see :py:func:`_kept_frequencies`), each keeps its sign and its imaginary part and takes the rest from the measured
    pixel. Where an imaginary part alone is larger than the measured pixel, those of the slice are lowered until it is
    not. The result is real and may undershoot zero; its magnitude would no longer give the low-resolution image.

    Args:
        magnitude: False takes the low-resolution image with its signs, as a real image whose spectrum is put back
            whole. Of a magnitude image this makes ringing below zero positive, which costs more than it mends.

    Raises:
        ValueError: when called, images that do not have the same channels and axes, a low-resolution image that is
            larger along an axis, or not smaller along any, or an image without 2 or 3 spatial axes.
        TypeError: when called with a complex image.

    Example::

        consistent = KSpaceDataConsistency()(sr, low)  # (1, 240, 240, 155), (1, 120, 120, 155) -> (1, 240, 240, 155)
    """

    backend = (TransformBackends.TORCH,)

    def __init__(self, magnitude: bool = True) -> None:
        self.magnitude = magnitude

    def __call__(self, img: NdarrayOrTensor, low_resolution: NdarrayOrTensor) -> Tensor:
        """
        Args:
            img: super-resolved image, ``(C, X, Y)`` or ``(C, X, Y, S)`` with the slices last; array, tensor or
                ``MetaTensor``.
            low_resolution: what was measured, on the LR matrix over the same field of view; the same axes.

        Returns:
            Image of the shape of ``img``, on its device; float64 if ``img`` is, else float32; a ``MetaTensor`` with
            the meta of ``img`` if it is one.
        """
        x = _as_real_tensor(img).contiguous()
        measured = _as_real_tensor(low_resolution).to(x).contiguous()
        low, full = tuple(measured.shape), tuple(x.shape)
        if len(low) != len(full) or low[0] != full[0]:
            raise ValueError(f"low_resolution must have the channels and axes of img {full}, got {low}.")
        if low == full or any(n > size for n, size in zip(low, full)):
            raise ValueError(
                f"low_resolution must be smaller than img {full} along an axis and larger along none, got {low}."
            )
        axes = _changed_axes(low, full)
        enlarged = math.prod(full[axis] / low[axis] for axis in axes)
        found = torch.fft.ifftn(_cropped_spectrum(x, low), dim=axes) / enlarged
        if self.magnitude:
            imaginary = found.imag * _share_below(found.imag.abs(), measured.abs(), axes)
            real = ((measured.abs() - imaginary) * (measured.abs() + imaginary)).clamp_min(0).sqrt()
            wanted = torch.complex(torch.where(found.real < 0, -real, real), imaginary)
        else:
            wanted = torch.complex(measured, torch.zeros_like(measured))
        change = torch.fft.fftn(wanted - found, dim=axes) * enlarged
        unpaired = torch.zeros(change.shape, dtype=torch.bool, device=x.device)
        for axis in axes:
            n, size = low[axis], full[axis]
            ramp = _phase_ramp(_kept_frequencies(n, x.device), size, size / n, change, axis)
            change = change * ramp.conj()
            if n % 2 == 0:
                unpaired.select(axis, n // 2).fill_(True)
        # A real image has the conjugate at +n/2, too, which taking the real part leaves half to either.
        change = torch.where(unpaired, 2 * change, change)
        x = x + torch.fft.ifftn(_placed_spectrum(change, full), dim=axes).real
        return _with_meta(x, img, [1.0] * (x.ndim - 1))


def _share_below(values: Tensor, limit: Tensor, axes: Sequence[int]) -> Tensor:
    """The largest factor up to 1 by which ``values`` stay below ``limit`` everywhere along ``axes``, for each slice."""
    return torch.where(values > limit, limit / values, torch.ones_like(values)).amin(dim=axes, keepdim=True)


def _output_keys(keys: Sequence[Hashable], output_keys: KeysCollection | None) -> tuple[Hashable, ...]:
    names = tuple(keys) if output_keys is None else ensure_tuple(output_keys)
    if len(names) != len(keys):
        raise ValueError(f"output_keys must name one key for each of keys {tuple(keys)}, got {names}.")
    return names


class KSpaceLowResolutiond(MapTransform):
    """
    Dictionary-based wrapper of :py:class:`KSpaceLowResolution`.

    Args:
        keys: keys of the HR images.
        scale: see :py:class:`KSpaceLowResolution`.
        mode: see :py:class:`KSpaceLowResolution`.
        noise_std: see :py:class:`KSpaceLowResolution`.
        seed: see :py:class:`KSpaceLowResolution`.
        output_keys: keys to write the LR images to, one for each of ``keys``; in place by default.
        scale_key: key that holds the scale of an item, in place of ``scale``, where an item has this key.
        allow_missing_keys: do not raise if a key is missing.

    Raises:
        ValueError: output_keys and keys differ in number, and whatever :py:class:`KSpaceLowResolution`
            refuses.
    """

    backend = KSpaceLowResolution.backend

    def __init__(
        self,
        keys: KeysCollection,
        scale: float | Sequence[float],
        mode: str = "crop",
        noise_std: float = 0.0,
        seed: int = 0,
        output_keys: KeysCollection | None = None,
        scale_key: Hashable | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.output_keys = _output_keys(self.keys, output_keys)
        self.scale_key = scale_key
        self.degrade = KSpaceLowResolution(scale, mode, noise_std, seed)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        degrade = self.degrade
        if self.scale_key in d:
            degrade = KSpaceLowResolution(d[self.scale_key], degrade.mode, degrade.noise_std, degrade.seed)
        for key, output_key in self.key_iterator(d, self.output_keys):
            d[output_key] = degrade(d[key])
        return d


class KSpaceUpsampled(MapTransform):
    """
    Dictionary-based wrapper of :py:class:`KSpaceUpsample`; the matrix is that of another image.

    Args:
        keys: keys of the LR images.
        like_key: key of the channel-first image whose spatial size is taken, and whose affine too if both are
            ``MetaTensor``: it must cover the same field of view, and headers that say so may differ by rounding.
        mode: see :py:class:`KSpaceUpsample`.
        output_keys: keys to write the upsampled images to, one for each of ``keys``; in place by default.
        allow_missing_keys: do not raise if one of ``keys`` is missing; ``like_key`` is always needed.

    Raises:
        ValueError: output_keys and keys differ in number, and whatever :py:class:`KSpaceUpsample` refuses.
        KeyError: when called without ``like_key``.
    """

    backend = KSpaceUpsample.backend

    def __init__(
        self,
        keys: KeysCollection,
        like_key: Hashable,
        mode: str = "zero_fill",
        output_keys: KeysCollection | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.like_key = like_key
        self.output_keys = _output_keys(self.keys, output_keys)
        self.upsample = KSpaceUpsample(mode)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        if self.like_key not in d:
            raise KeyError(f"like_key {self.like_key!r} of KSpaceUpsampled is missing, found {list(d)}.")
        like = d[self.like_key]
        for key, output_key in self.key_iterator(d, self.output_keys):
            upsampled = self.upsample(d[key], like.shape[1:])
            if isinstance(upsampled, MetaTensor) and isinstance(like, MetaTensor):
                upsampled.affine = like.affine
            d[output_key] = upsampled
        return d


class KSpaceDataConsistencyd(MapTransform):
    """
    Dictionary-based wrapper of :py:class:`KSpaceDataConsistency`.

    Args:
        keys: keys of the super-resolved images, changed in place.
        low_resolution_key: key of the measured image, in the same intensity units.
        magnitude: see :py:class:`KSpaceDataConsistency`.
        allow_missing_keys: do not raise if one of ``keys`` is missing; ``low_resolution_key`` is always needed.

    Raises:
        ValueError: whatever :py:class:`KSpaceDataConsistency` refuses.
        KeyError: when called without ``low_resolution_key``.
    """

    backend = KSpaceDataConsistency.backend

    def __init__(
        self,
        keys: KeysCollection,
        low_resolution_key: Hashable,
        magnitude: bool = True,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.low_resolution_key = low_resolution_key
        self.make_consistent = KSpaceDataConsistency(magnitude)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        if self.low_resolution_key not in d:
            raise KeyError(f"low_resolution_key {self.low_resolution_key!r} is missing, found {list(d)}.")
        for key in self.key_iterator(d):
            d[key] = self.make_consistent(d[key], d[self.low_resolution_key])
        return d


class RequireKSpaceCropd(MapTransform):
    """
    Make sure that images have the grid that cropping the k-space of another one gives; nothing is changed.

    Args:
        keys: keys of the low-resolution images, ``MetaTensor``.
        like_key: key of the ``MetaTensor`` on the high-resolution grid, with the axes in the same order.

    Raises:
        ValueError: when called, an image that is not coarser along any axis, so that what was measured of it is not
            known, or one that covers another field of view.
    """

    def __init__(self, keys: KeysCollection, like_key: Hashable) -> None:
        super().__init__(keys)
        self.like_key = like_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        like = d[self.like_key]
        like_name = str(like.meta.get("filename_or_obj", self.like_key))
        for key in self.key_iterator(d):
            image, full = d[key], tuple(like.shape[1:])
            low, name = tuple(image.shape[1:]), str(image.meta.get("filename_or_obj", key))
            if low == full or any(n > size for n, size in zip(low, full)):
                raise ValueError(
                    f"data consistency: {name} has the matrix {low} and {like_name} has {full}; expected the smaller "
                    "matrix that was measured (an interpolated volume does not tell): leave data_consistency off"
                )
            expected = _rescaled(like.affine, [size / n for n, size in zip(low, full)])
            try:
                require_same_grid((low, image.affine.cpu().numpy(), name), (low, expected.cpu().numpy(), like_name))
            except ValueError as error:
                raise ValueError(
                    f"data consistency: {name} does not cover the field of view of {like_name}, so its frequencies are "
                    "not those of the result: leave data_consistency off"
                ) from error
        return d
