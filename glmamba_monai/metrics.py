"""PSNR and SSIM of a super-resolved volume, slice by slice, under every convention of docs/data.md, metrics."""

from __future__ import annotations

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
