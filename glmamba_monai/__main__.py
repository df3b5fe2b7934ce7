"""Command line: ``python -m glmamba_monai COMMAND``; see ``--help``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import fire


def super_resolve(
    image: str,
    reference: str,
    output: str,
    scale: Any = "auto",
    network: str = "glmamba",
    weights: str | None = None,
    slice_axis: Any = "auto",
) -> None:
    """Super-resolve a low-resolution NIfTI volume with a sharp one of another contrast.

    Args:
        image: low-resolution NIfTI volume.
        reference: NIfTI volume of another contrast, same field of view and slices, finer in plane.
        output: NIfTI file to write, on the reference's grid.
        scale: auto takes the factor from the files; a number, or [a,b] in plane, is checked against them.
        network: registered network.
        weights: file of weights, instead of the bundle's models/model.pt.
        slice_axis: auto, 0, 1, 2, axial, coronal or sagittal.
    """
    from glmamba_monai import inference

    inference.super_resolve(image, reference, output, scale, network, weights, slice_axis)
    print(output)


def simulate(
    image: str,
    output: str,
    scale: Any = 2,
    slice_axis: Any = "auto",
    mode: str = "crop",
    noise_std: float = 0.0,
    seed: int = 0,
) -> None:
    """Make a low-resolution NIfTI volume of a high-resolution one, by cropping its k-space in plane.

    Args:
        image: high-resolution NIfTI volume.
        output: NIfTI file to write.
        scale: factor in plane, or [a,b].
        slice_axis: auto, 0, 1, 2, axial, coronal or sagittal.
        mode: crop (smaller matrix) or zero_fill (same matrix).
        noise_std: standard deviation of complex noise, in intensity units.
        seed: of the noise.
    """
    from glmamba_monai import inference

    low_resolution = inference.simulate(image, output, scale, slice_axis, mode, noise_std, seed)
    print(f"{output}: {' x '.join(map(str, low_resolution.shape[1:]))}")


def demo_data(out: str, subjects: int = 6, seed: int = 0) -> None:
    """Write synthetic brains (T1, T2, PD, FLAIR, some with a tumour and its label) as NIfTI.

    Args:
        out: folder to write; must not exist or be empty.
        subjects: how many.
        seed: of all that is random.
    """
    from glmamba_monai.data import write_demo_data

    print(write_demo_data(out, subjects=subjects, seed=seed))


def cost(height: int = 240, width: int = 240) -> None:
    """Print parameters and multiply-adds of every network, counted truly and as the paper counts.

    Args:
        height: of the slice, in pixels.
        width: of the slice, in pixels.
    """
    from glmamba_monai.networks import cost_table

    print(cost_table(height, width))


COMMANDS: dict[str, Callable[..., None]] = {
    "super-resolve": super_resolve,
    "simulate": simulate,
    "demo-data": demo_data,
    "cost": cost,
}


def main() -> None:
    """Run a command; an error is one line that says what is wrong and what to do, and exit status 2."""
    try:
        fire.Fire(COMMANDS, name="glmamba_monai")
    except (OSError, ValueError, RuntimeError) as error:
        from glmamba_monai.inference import root_cause

        print(f"glmamba_monai: error: {root_cause(error)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
