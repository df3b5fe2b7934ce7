"""PSNR and SSIM of a super-resolved volume, slice by slice, under every convention of docs/data.md, metrics."""

from __future__ import annotations

import math

import torch
from monai.metrics.regression import KernelType, compute_ssim_and_cs
from torch import Tensor

# column -> what it is; the order is the order of the columns in metrics.csv
CONVENTIONS = {
    "psnr": "PSNR (dB), data range = maximum of the HR volume",
    "ssim": "SSIM, Gaussian 11x11 sigma 1.5, data range = maximum of the HR volume",
    "psnr_slice_range": "PSNR (dB), data range = maximum of the HR slice",
    "ssim_slice_range": "SSIM, Gaussian 11x11 sigma 1.5, data range = maximum of the HR slice",
    "psnr_foreground": "PSNR (dB) over the foreground mask, data range = maximum of the HR volume",
    "ssim_foreground": "SSIM, Gaussian 11x11 sigma 1.5, mean over the foreground mask, data range as before",
    "ssim_uniform7": "SSIM, uniform 7x7, data range = maximum of the HR volume",
}
# The same for the standard deviation of a self-ensemble (docs/confidence.md)
SD_METRICS = {
    "sd_spearman": "Spearman's correlation of SD and absolute error over the foreground",
    "edges_spearman": "the same of the result's gradient in place of its SD: what a plain map of edges reaches",
    "sd_pearson": "Pearson's correlation of SD and absolute error over the foreground",
    "sd_top_error": "mean absolute error of the 10 % of the foreground with the largest SD, over that of all of it",
    "sd_top_error_limit": "the same of the 10 % with the largest error: what a perfect map would reach",
    "sd_within_2": "share of the foreground with an error of at most 2 SD: 0.95 if the error were normal with this SD",
}
TOP = 0.1
GAUSSIAN_SIZE, GAUSSIAN_SIGMA, UNIFORM_SIZE = 11, 1.5, 7


def psnr(mean_squared_error: Tensor) -> Tensor:
    """PSNR in dB of images whose data range is 1."""
    return -10 * torch.log10(mean_squared_error)


def ssim_map(prediction: Tensor, target: Tensor, kernel: str = "gaussian") -> Tensor:
    """SSIM around every pixel whose window lies inside the image.

    Args:
        prediction: ``(S, 1, H, W)``, data range 1.
        target: the same.
        kernel: "gaussian" (11x11, sigma 1.5) or "uniform" (7x7).
    """
    size = GAUSSIAN_SIZE if kernel == "gaussian" else UNIFORM_SIZE
    similarity, _ = compute_ssim_and_cs(
        prediction,
        target,
        spatial_dims=2,
        kernel_size=(size, size),
        kernel_sigma=(GAUSSIAN_SIGMA, GAUSSIAN_SIGMA),
        data_range=1.0,
        kernel_type=KernelType(kernel),
    )
    return similarity


def slice_metrics(
    prediction: Tensor, target: Tensor, data_range: float, mask: Tensor | None = None
) -> dict[str, Tensor]:
    """Every convention for every slice.

    Both images are magnitude images: the prediction enters with its magnitude.

    Args:
        prediction: ``(S, 1, H, W)``, H, W >= 11.
        target: the same, in the same intensity units.
        data_range: maximum of the HR volume, in these units.
        mask: foreground ``(S, 1, H, W)``; None for everything.

    Returns:
        ``{convention: (S,)}``, see :data:`CONVENTIONS`. Where both images are the same a PSNR is infinite; in a slice
        without foreground the foreground metrics are NaN.

    Raises:
        ValueError: the shapes differ, the slices are smaller than 11x11, or the data range is not positive.
    """
    if prediction.shape != target.shape or prediction.dim() != 4 or prediction.shape[1] != 1:
        raise ValueError(
            f"prediction and target must both be (S, 1, H, W), got {tuple(prediction.shape)} and {tuple(target.shape)}"
        )
    if min(target.shape[2:]) < GAUSSIAN_SIZE:
        raise ValueError(
            f"SSIM needs slices of at least {GAUSSIAN_SIZE}x{GAUSSIAN_SIZE}, got {tuple(target.shape[2:])}"
        )
    if not data_range > 0:
        raise ValueError(f"data_range must be positive, got {data_range}")
    prediction, target = prediction.float().abs(), target.float()
    mask = torch.ones_like(target, dtype=torch.bool) if mask is None else mask.bool()
    # Divided by the data range, so that it is 1 for every convention.
    sr, hr = prediction / data_range, target / data_range
    slice_maximum = hr.amax(dim=(1, 2, 3), keepdim=True).clamp_min(torch.finfo(hr.dtype).tiny)
    squared = (sr - hr).square()
    gaussian = ssim_map(sr, hr)
    border = GAUSSIAN_SIZE // 2
    inside = mask[:, :, border:-border, border:-border]
    mean_squared_error = squared.mean(dim=(1, 2, 3))
    return {
        "psnr": psnr(mean_squared_error),
        "ssim": gaussian.mean(dim=(1, 2, 3)),
        "psnr_slice_range": psnr(mean_squared_error / slice_maximum.flatten().square()),
        "ssim_slice_range": ssim_map(sr / slice_maximum, hr / slice_maximum).mean(dim=(1, 2, 3)),
        "psnr_foreground": psnr((squared * mask).sum(dim=(1, 2, 3)) / mask.sum(dim=(1, 2, 3))),
        "ssim_foreground": (gaussian * inside).sum(dim=(1, 2, 3)) / inside.sum(dim=(1, 2, 3)),
        "ssim_uniform7": ssim_map(sr, hr, "uniform").mean(dim=(1, 2, 3)),
    }


def sd_metrics(sd: Tensor, error: Tensor, gradient: Tensor) -> dict[str, float]:
    """How well a standard deviation tells where the error is large.

    Args:
        sd: ``(N,)``, of the foreground voxels of a subject.
        error: the absolute error there, ``(N,)``.
        gradient: of the result, its magnitude, ``(N,)``.

    Returns:
        ``{name: value}``, see :data:`SD_METRICS`; NaN where one of the two is the same everywhere.
    """
    sd, error, gradient = sd.double(), error.double(), gradient.double()
    if any(len(values.unique()) < 2 for values in (sd, error)):
        return dict.fromkeys(SD_METRICS, math.nan)
    top, mean = max(1, round(TOP * len(sd))), error.mean()
    return {
        "sd_spearman": _correlation(_ranks(sd), _ranks(error)),
        "edges_spearman": _correlation(_ranks(gradient), _ranks(error)),
        "sd_pearson": _correlation(sd, error),
        "sd_top_error": float(error[sd.topk(top).indices].mean() / mean),
        "sd_top_error_limit": float(error.topk(top).values.mean() / mean),
        "sd_within_2": float((error <= 2 * sd).double().mean()),
    }


def gradient_magnitude(slices: Tensor) -> Tensor:
    """In-plane gradient of ``(S, 1, H, W)``, by central differences."""
    return torch.hypot(*torch.gradient(slices, dim=(2, 3)))


def _correlation(a: Tensor, b: Tensor) -> float:
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / (a.square().sum() * b.square().sum()).sqrt())


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 1 on; equal values have the mean of theirs."""
    _, places, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts.double() - 1) / 2)[places]
