"""Command line: ``python -m glmamba_monai COMMAND``; see ``--help``."""

from __future__ import annotations

import functools
import inspect
import logging
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
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
    bundle_root: str | None = None,
    data_consistency: bool = False,
    register: Any = "auto",
    self_ensemble: bool = False,
) -> None:
    """Super-resolve a low-resolution volume with a sharp one of another contrast.

    Args:
        image: low-resolution volume: NIfTI, NRRD, MHA or MHD file, or the folder of one DICOM series.
        reference: volume of another contrast, in any of these formats, finer in plane; resampled if need be.
        output: file to write, .nii.gz, .nii, .nrrd or .mha, or for a DICOM series a new folder.
        scale: auto takes the factor from the files; a number, or [a,b] in plane, is checked against them.
        network: registered network.
        weights: file of weights, instead of the bundle's for that network: model_2x.pt where the factor is 2, and so
            on where there is such a file, else model.pt.
        slice_axis: auto, 0, 1, 2, axial, coronal or sagittal.
        bundle_root: folder of the bundle, instead of the one beside the package.
        data_consistency: put the measured low frequencies in place of the result's.
        register: move the reference onto the low-resolution volume first: True or affine, where the two lie on each
            other better then; auto, where they lie 1 mm or more apart; False does not look.
        self_ensemble: mean of all eight orientations of a slice, and their standard deviation in a file of its own.
    """
    from glmamba_monai import formats, inference

    # Ignite logs every error that ends a run, which main reports, and MONAI that its logging is left alone.
    logging.getLogger("ignite").setLevel(logging.CRITICAL)
    logging.getLogger("monai.bundle.workflows").setLevel(logging.ERROR)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("glmamba_monai.engines.weights").setLevel(logging.INFO)  # which weights are used
    inference.super_resolve(
        image,
        reference,
        output,
        scale,
        network,
        weights,
        slice_axis,
        bundle_root,
        data_consistency,
        register,
        self_ensemble,
    )
    print(output)
    if self_ensemble:
        print(formats.sd_path(output))


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


def report(
    image: str,
    low_resolution: str,
    reference: str,
    output: str,
    truth: str | None = None,
    metrics: str | None = None,
    weights: str | None = None,
    registration: str | None = None,
    provenance: str | None = None,
    max_slices: int = 40,
    slice_axis: Any = "auto",
) -> None:
    """Write an HTML file that shows a super-resolved volume beside what it was made of, slice by slice.

    Args:
        image: super-resolved volume.
        low_resolution: volume that it was made of.
        reference: volume of the other contrast.
        output: HTML file to write.
        truth: high-resolution volume on the output's grid, where it is known; adds maps of the error.
        metrics: metrics.csv of an evaluation, shown as a table.
        weights: file of the weights that were used; its name and SHA-256 are stated.
        registration: JSON file that a registration of the reference has left beside the result.
        provenance: JSON file with an object of further facts to state.
        max_slices: show at most so many, evenly spaced.
        slice_axis: auto, 0, 1, 2, axial, coronal or sagittal.
    """
    from glmamba_monai.report import write_report

    command = shlex.join(["python", "-m", "glmamba_monai", *sys.argv[1:]])
    facts = {"metrics": metrics, "weights": weights, "registration": registration, "provenance": provenance}
    shown = {"command": command, "max_slices": max_slices, "slice_axis": slice_axis}
    print(write_report(image, low_resolution, reference, output, truth, **facts, **shown))


def pair(target: str, reference: str, output: str) -> None:
    """Make one 4-D NIfTI file of a low-resolution volume and its reference, on the reference's grid.

    Args:
        target: low-resolution volume.
        reference: volume of another contrast.
        output: NIfTI file to write.
    """
    from glmamba_monai import inference

    both = inference.pair(target, reference, output)
    print(f"{output}: {' x '.join(map(str, both.shape[1:]))}, target and reference")


def label_app(folder: str, weights: str | None = None, bundle_root: str | None = None) -> None:
    """Make the app folder of a MONAI Label server with this model, and print the command that starts it.

    Args:
        folder: to make; must not exist or be empty.
        weights: file of weights for all volumes, instead of the bundle's, chosen by the factor of each.
        bundle_root: folder of the bundle, instead of the one beside the package.
    """
    from glmamba_monai.label_app import set_up_app

    print(set_up_app(folder, weights, bundle_root))


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


def export_onnx(output: str, network: str = "glmamba", weights: str | None = None) -> None:
    """Write a network with its weights as ONNX, for slices of any size.

    Args:
        output: .onnx file to write.
        network: registered network.
        weights: file of weights, instead of the bundle's model.pt for that network.
    """
    if not output.endswith(".onnx"):  # such as the weights that are meant
        raise ValueError(f"output {output}: the name must end in .onnx; weights are named with --weights")
    from glmamba_monai.files import require_writable

    require_writable(Path(output).absolute().parent)
    from glmamba_monai import onnx_export
    from glmamba_monai.bundle import locate_bundle, weights_folders
    from glmamba_monai.engines import find_weights, load_weights
    from glmamba_monai.networks import build_network

    built = build_network(network)
    found = find_weights(weights, weights_folders(locate_bundle(look_at_command_line=False), network), built)
    if found is not None:
        load_weights(built, found, network)
    print("exporting, which takes a minute or two", file=sys.stderr, flush=True)
    onnx_export.export_onnx(built, output)
    print(output)


# What a parameter of that type takes from the command line; fire reads any text that looks like a number as one.
EXPECTED: dict[str, tuple[type | tuple[type, ...], str]] = {
    "str": (str, "text; write ./NAME for a file whose name is a number"),
    "str | None": ((str, type(None)), "text; write ./NAME for a file whose name is a number"),
    "int": (int, "an integer"),
    "float": ((int, float), "a number"),
    "bool": (bool, "True or False"),
}


class Call:
    """A command with its arguments, not yet run; private, so that fire offers nothing of it."""

    def __init__(self, run: Callable[[], None]) -> None:
        self._run = run


def deferred(command: Callable[..., None]) -> Callable[..., Call]:
    """The command in a form for fire, which would run it first and complain about an unknown option afterwards.

    Raises:
        ValueError: by the form, when an argument is of the wrong type.
    """
    signature = inspect.signature(command)

    @functools.wraps(command)
    def bind(*arguments: Any, **options: Any) -> Call:
        for name, value in signature.bind(*arguments, **options).arguments.items():
            types, words = EXPECTED.get(signature.parameters[name].annotation, (object, ""))
            if not isinstance(value, types) or (isinstance(value, bool) and types not in (bool, object)):
                raise ValueError(f"{name} must be {words}, got {value!r}")
        return Call(functools.partial(command, *arguments, **options))

    return bind


COMMANDS = {
    "super-resolve": deferred(super_resolve),
    "simulate": deferred(simulate),
    "report": deferred(report),
    "pair": deferred(pair),
    "label-app": deferred(label_app),
    "demo-data": deferred(demo_data),
    "cost": deferred(cost),
    "export-onnx": deferred(export_onnx),
}


def main() -> None:
    """Run a command; an error is one line that says what is wrong and what to do, and exit status 2."""
    try:
        call = fire.Fire(COMMANDS, name="glmamba_monai", serialize=lambda r: None if isinstance(r, Call) else r)
        if isinstance(call, Call):  # otherwise fire has shown its help
            call._run()
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        from glmamba_monai.errors import root_cause

        print(f"glmamba_monai: error: {root_cause(error)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
