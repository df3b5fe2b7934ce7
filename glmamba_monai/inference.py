"""Super-resolution and its simulation from Python; the work is done by ``inference.json`` and the transforms."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigWorkflow
from monai.data import MetaTensor

from glmamba_monai.bundle import locate_bundle, require_options
from glmamba_monai.errors import root_cause
from glmamba_monai.files import require_another, require_writable, save_volume
from glmamba_monai.formats import require_output, save_result, sd_path, without_ending
from glmamba_monai.transforms import (
    KSpaceLowResolution,
    KSpaceUpsampled,
    LoadVolume,
    LoadVolumed,
    MatchReferenced,
    SlicesBackd,
)
from glmamba_monai.transforms.grid import find_slice_axis
from glmamba_monai.transforms.volume import INTERPOLATED_KEY, slices_back, slices_last

PathLike = str | os.PathLike[str]


def super_resolve(
    image: PathLike,
    reference: PathLike,
    output: PathLike | None = None,
    scale: str | float | Sequence[float] = "auto",
    network: str = "glmamba",
    weights: PathLike | None = None,
    slice_axis: str | int = "auto",
    bundle_root: PathLike | None = None,
    data_consistency: bool = False,
    register: bool | str = "auto",
    self_ensemble: bool = False,
    **overrides: Any,
) -> MetaTensor | tuple[MetaTensor, MetaTensor]:
    """Super-resolve a low-resolution volume with a sharp volume of another contrast.

    On a CPU this process keeps the memory that it has used from then on (:func:`~glmamba_monai.ops.keep_freed_memory`).

    Args:
        image: low-resolution volume: a NIfTI, NRRD or MetaImage file, or the folder of one DICOM series.
        reference: volume of another contrast, in any of these formats, finer in plane. Over another field of view,
            or with other slices, it is resampled (docs/registration.md).
        output: file to write, NIfTI, NRRD or MHA by its name, or where ``image`` is a DICOM series a new folder for a
            derived series (:func:`~glmamba_monai.formats.write_derived_series`); None writes nothing.
        scale: "auto" takes the factor from the two files; a number (or one per in-plane axis) is checked.
        network: registered name.
        weights: file of weights; None for the bundle's: ``models/model_2x.pt`` where the factor is 2, and so on where
            there is such a file, else ``models/model.pt`` (:func:`~glmamba_monai.engines.find_weights`); those of
            another network than ``glmamba`` lie in ``models/NETWORK``.
        slice_axis: "auto", an axis, or "axial", "coronal", "sagittal".
        bundle_root: folder of the bundle; None for the one beside the package.
        data_consistency: put the measured low frequencies of ``image`` in place of the result's
            (:class:`~glmamba_monai.transforms.KSpaceDataConsistency`). ``image`` must have the matrix it was measured
            on, over the reference's field of view.
        register: move ``reference`` onto ``image``: False does not look whether the two lie on each other; True,
            rigidly, where they lie on each other better afterwards; "affine" may stretch it, too; "auto" where they
            lie 1 mm or more apart. What was found is kept beside ``output`` (docs/registration.md).
        self_ensemble: run the network on each slice in all eight orientations, which takes eight times as long; the
            result is their mean, and their standard deviation goes beside ``output``
            (:func:`~glmamba_monai.formats.sd_path`).
        overrides: further keys of ``inference.json``, such as ``batch_size`` or ``device``; another is refused.

    Returns:
        ``(1, X, Y, Z)``, float32, intensities in the units of ``image``; on the reference's grid, or where that was
        resampled on a finer grid with the slices of ``image``; with ``self_ensemble``
        the result and its standard deviation, both of this kind.

    Raises:
        FileNotFoundError, ValueError, OSError: a file is missing, does not fit, cannot be written or would be written
            over what it is made from.
    """
    root = Path(bundle_root) if bundle_root is not None else Path(locate_bundle(look_at_command_line=False))
    config = str(root / "configs" / "inference.json")
    require_options(overrides, config)
    if output is not None:
        require_output(output, image)
        for written in (output, *([sd_path(output)] if self_ensemble else [])):
            require_another(written, image=image, reference=reference)
        require_writable(Path(output).absolute().parent)
    found = _run(
        config,
        bundle_root=str(root),
        image=str(image),
        reference=str(reference),
        output_dir=None,
        registration_file=None if output is None else f"{without_ending(output)}_registration",
        scale=scale,
        network=network,
        weights=None if weights is None else str(weights),
        slice_axis=slice_axis,
        data_consistency=data_consistency,
        register=register,
        self_ensemble=self_ensemble,
        **overrides,
    )
    result = found["pred"].cpu()
    if output is not None:
        save_result(result, output, image)
    if not self_ensemble:
        return result
    sd = found["sd"].cpu()
    if output is not None:
        save_result(sd, sd_path(output), image)
    return result, sd


def _run(config: str, **options: Any) -> Mapping[str, MetaTensor]:
    """What ``inference.json`` makes of one pair; where it fails, the error itself, not what MONAI wraps around it."""
    try:
        workflow = ConfigWorkflow(config, workflow_type="infer", logging_file=False, **options)
        workflow.initialize()
        workflow.run()
        (found,) = workflow.evaluator.state.output
        workflow.finalize()
        return found
    except RuntimeError as error:
        cause = root_cause(error)
    raise cause


def simulate(
    image: PathLike,
    output: PathLike,
    scale: float | Sequence[float] = 2,
    slice_axis: str | int = "auto",
    mode: str = "crop",
    noise_std: float = 0.0,
    seed: int = 0,
) -> MetaTensor:
    """Make a low-resolution volume of a high-resolution one, as a scanner would have measured it.

    Args:
        image: high-resolution NIfTI volume.
        output: NIfTI file to write.
        scale: factor in plane, or one per in-plane axis.
        slice_axis: "auto", an axis, or "axial", "coronal", "sagittal".
        mode: "crop" for a smaller matrix, "zero_fill" for the same matrix.
        noise_std: standard deviation of the complex noise, in intensity units of the image.
        seed: of the noise.

    Returns:
        The low-resolution volume ``(1, X, Y, Z)``.

    Raises:
        FileNotFoundError, ValueError, OSError: a file is missing, unfit or cannot be written.
    """
    _require_nifti_name(output)
    require_another(output, image=image)
    degrade = KSpaceLowResolution(scale, mode=mode, noise_std=noise_std, seed=seed)
    volume = LoadVolume()(image)
    axis = find_slice_axis(volume.affine.numpy(), slice_axis)
    low_resolution = slices_back(degrade(slices_last(volume, axis)), axis)
    save_volume(low_resolution, output)
    return low_resolution


def pair(target: PathLike, reference: PathLike, output: PathLike) -> MetaTensor:
    """Make one 4-D NIfTI file of a low-resolution volume and its reference, for programs that pass a single file.

    Both lie on the reference's grid: a coarse target is upsampled by zero-filling, as the network would be given it.

    Args:
        target: low-resolution volume, or one that the scanner has interpolated to the reference's matrix.
        reference: volume of another contrast.
        output: NIfTI file to write.

    Returns:
        ``(2, X, Y, Z)``, target first.

    Raises:
        FileNotFoundError, ValueError, OSError: a file is missing, does not fit or cannot be written.
    """
    _require_nifti_name(output)
    require_another(output, target=target, reference=reference)
    data = LoadVolumed(["image", "reference"])({"image": target, "reference": reference})
    data[INTERPOLATED_KEY] = sorted(data["image"].shape) == sorted(data["reference"].shape)
    data = MatchReferenced(["image", "reference"])(data)
    data = KSpaceUpsampled("image", like_key="reference")(data)
    data = SlicesBackd(["image", "reference"])(data)
    both = MetaTensor(torch.cat([data["image"].as_tensor(), data["reference"].as_tensor()]))
    both.affine = data["reference"].affine
    save_volume(both, output)
    return both


def _require_nifti_name(path: PathLike) -> None:
    if not str(path).endswith((".nii", ".nii.gz")):
        raise ValueError(f"output {path}: the name must end in .nii or .nii.gz")
