"""The README's picture: a phantom subject's T2 in low resolution, with T1 as reference, and what becomes of it.

    python docs/make_pictures.py --weights bundle/results/model.pt

needs the weights of the first README command and matplotlib (test extra).
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import fire
import matplotlib
import nibabel as nib
import numpy as np

from glmamba_monai import simulate, super_resolve
from glmamba_monai.data import demo_data

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main(weights: str = "bundle/results/model.pt", subject: str = "subject-005", output: str = "docs/demo.png") -> None:
    """Draw the middle slice of a demo subject.

    Args:
        weights: of the network ``glmamba``.
        subject: of the demo data; subject-005 is the one that the demo holds out.
        output: PNG file.
    """
    folder = demo_data() / subject
    with tempfile.TemporaryDirectory() as scratch:
        low = Path(scratch) / "low.nii.gz"
        simulate(folder / "t2.nii.gz", low, scale=2)
        volumes = {
            "T1, reference": nib.load(folder / "t1.nii.gz").get_fdata(),
            "T2, low resolution (2x)": nib.load(low).get_fdata(),
            "zero-filling": super_resolve(low, folder / "t1.nii.gz", network="zero_filling")[0].numpy(),
            "GLMamba": super_resolve(low, folder / "t1.nii.gz", weights=weights)[0].numpy(),
            "T2, truth": nib.load(folder / "t2.nii.gz").get_fdata(),
        }
    truth = volumes["T2, truth"]
    middle = truth.shape[2] // 2
    figure, axes = plt.subplots(2, 5, figsize=(15, 7.4), facecolor="black")
    for column, (name, volume) in enumerate(volumes.items()):
        image = volume[..., middle]
        axes[0, column].imshow(image.T, cmap="gray", origin="lower", vmin=0, vmax=np.percentile(image, 99.8))
        axes[0, column].set_title(name, color="white")
        if name in ("zero-filling", "GLMamba"):
            error = np.abs(image - truth[..., middle])
            axes[1, column].imshow(error.T, cmap="inferno", origin="lower", vmin=0, vmax=0.2 * truth.max())
            error_db = 10 * np.log10(truth.max() ** 2 / (error**2).mean())
            axes[1, column].set_title(f"|error|, PSNR {error_db:.1f} dB", color="white")
    for axis in axes.flat:
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(output, dpi=75, facecolor="black")
    print(output)


if __name__ == "__main__":
    fire.Fire(main)
