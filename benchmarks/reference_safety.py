"""What a wrong reference does: PSNR and SSIM with the right one, another subject's, none, a moved and a changed one.

python benchmarks/reference_safety.py --dataset_dir DATA --subject patient07 --scale 2

Moved is shifted or rotated; changed, as by another sequence or a poor scan, has inverted contrast, another gamma or
Rician noise. docs/make_reference_curves.py draws what --output_dir writes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fire
import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.transforms import Compose, Orientation, RandRicianNoise, ResizeWithPadOrCrop
from nibabel import aff2axcodes
from scipy import ndimage
from timing import print_row, print_table
from torch import Tensor, nn
from tqdm import tqdm

from glmamba_monai.bundle import weights_folders
from glmamba_monai.data import dataset_or_demo, find_items
from glmamba_monai.data.datalist import patient_of
from glmamba_monai.engines.weights import find_weights, load_weights
from glmamba_monai.files import require_writable, write_csv
from glmamba_monai.metrics import slice_metrics
from glmamba_monai.ops import keep_freed_memory
from glmamba_monai.transforms import LoadVolume, ScaleByPercentile, inverted_contrast

BUNDLE = Path(__file__).resolve().parent.parent / "bundle"
PIXELS, DEGREES = (1, 2, 4), (1, 2, 5)
GAMMA, NOISE, SEED = 1.5, 0.05, 0  # where the 99.9th percentile of the volume is 1
COLUMNS = ("reference", "psnr", "ssim", "psnr_over_zero_filling", "ssim_over_zero_filling")


def shifted(reference: Tensor, pixels: int) -> Tensor:
    """``(1, X, Y, S)`` moved in plane by whole pixels towards higher x; zeros move in."""
    moved = torch.zeros_like(reference)
    moved[:, pixels:] = reference[:, : reference.shape[1] - pixels]
    return moved


def rotated(reference: Tensor, degrees: float) -> Tensor:
    """``(1, X, Y, S)`` rotated in plane about its centre, from x towards y, by cubic splines; zeros move in."""
    turned = ndimage.rotate(reference.numpy(), degrees, axes=(1, 2), reshape=False, order=3)
    return torch.from_numpy(turned)


def with_gamma(reference: Tensor) -> Tensor:
    """Any shape, to the power of ``GAMMA``; what is negative becomes 0."""
    return reference.clamp(min=0) ** GAMMA


def with_noise(reference: Tensor) -> Tensor:
    """Any shape, with Rician noise of standard deviation ``NOISE``, the same whenever it is called."""
    add_noise = RandRicianNoise(prob=1, std=NOISE, sample_std=False).set_random_state(SEED)
    return add_noise(reference).as_tensor()


def of_another(file: str, reference: Tensor) -> Tensor:
    """The volume of another subject, padded and cropped about its centre onto the matrix of ``reference``."""
    axis_codes = "".join(aff2axcodes(reference.affine.numpy()))
    transform = [LoadVolume(), Orientation(axcodes=axis_codes, labels=None), ScaleByPercentile()]
    return Compose([*transform, ResizeWithPadOrCrop(reference.shape[1:])])(file).as_tensor()


def find_pair(items: list[dict[str, str]], subject: str, other: str | None) -> list[dict[str, str]]:
    """The items of the subject, and of the one whose reference is the wrong one: another patient if None is named.

    Raises:
        ValueError: there is no such subject, or no other patient.
    """
    by_name = {item["subject"]: item for item in items}
    if other is None:
        other = next((name for name in by_name if patient_of(name) != patient_of(subject)), "of another patient")
    for role, name in (("subject", subject), ("other", other)):
        if name not in by_name:
            raise ValueError(f"{role}: there is no subject {name}, found {', '.join(by_name)}")
    return [by_name[subject], by_name[other]]


def references(right: Tensor, wrong: Tensor, name: str) -> Iterator[tuple[str, Tensor]]:
    """What to call each reference, and the reference ``(1, X, Y, S)``."""
    yield "right", right
    yield f"of {name}", wrong
    yield "none (zeros)", torch.zeros_like(right)
    for pixels in PIXELS:
        yield f"shifted by {pixels} pixel{'s' * (pixels > 1)}", shifted(right, pixels)
    for degrees in DEGREES:
        yield f"rotated by {degrees} degree{'s' * (degrees > 1)}", rotated(right, degrees)
    yield "contrast inverted", inverted_contrast(right)
    yield f"gamma {GAMMA}", with_gamma(right)
    yield f"Rician noise of {NOISE}", with_noise(right)


@torch.inference_mode()
def super_resolve(network: nn.Module, image: Tensor, batch_size: int, device: str, title: str) -> Tensor:
    """``(2, X, Y, S)``, upsampled slices and their references, to ``(1, X, Y, S)``, with a bar of that title."""
    batches = image.permute(3, 0, 1, 2).contiguous().split(batch_size)
    found = [network(batch.to(device))[:, :1].cpu() for batch in tqdm(batches, title, leave=False)]
    return torch.cat(found).permute(1, 2, 3, 0)


def main(
    weights: str | None = None,
    dataset_dir: str | None = None,
    subject: str = "subject-005",
    scale: float | tuple[float, ...] = 2,
    network: str = "glmamba",
    other: str | None = None,
    target: str = "t2",
    reference: str = "t1",
    slices: int | None = 24,
    batch_size: int = 1,
    device: str = "cpu",
    output_dir: str | None = None,
) -> None:
    """Print a Markdown table, and write it as CSV; data and metrics are those of evaluate.json.

    Args:
        weights: file of weights; if there is none, the bundle's for that factor.
        dataset_dir: folder of subjects; the demo phantom if there is none.
        subject: whom to super-resolve.
        scale: factor in plane, or a,b.
        network: registered name.
        other: whose reference is the wrong one; the first of another patient if there is none.
        target: contrast to super-resolve.
        reference: contrast that guides.
        slices: so many, evenly spaced; None for all.
        batch_size: slices at once.
        device: cpu or cuda.
        output_dir: folder to write reference_safety_SCALE.csv into, over one of another run; none for printing alone.

    Raises:
        OSError: the folder cannot be written.
    """
    if output_dir is not None:
        require_writable(output_dir)
    keep_freed_memory(device)
    items, _ = find_items(dataset_or_demo(dataset_dir), target, reference)
    found, wrong = find_pair([item for section in items.values() for item in section], subject, other)
    parser = ConfigParser()
    parser.read_config(str(BUNDLE / "configs" / "train.json"))
    parser.update({"network": network, "scale": scale, "val_slices": f"${slices}"})
    net = parser.get_parsed_content("network_def").to(device).eval()
    path = find_weights(weights, weights_folders(BUNDLE, network), net, scale)
    if path is not None:
        load_weights(net, path, network)

    volumes = Compose(parser.get_parsed_content("train#deterministic_transforms"))(found)
    steps = ("target_levels", "interpolations", "slice_selection")
    select = Compose([transform for step in steps for transform in parser.get_parsed_content(f"validate#{step}")])
    other_reference = of_another(wrong["reference"], volumes["reference"])
    with_other = select({**volumes, "image": torch.cat((volumes["image"][:1], other_reference))})
    item = {k: v.as_tensor() if hasattr(v, "as_tensor") else v for k, v in select(volumes).items()}
    upsampled, right = item["image"].split(1)

    def figures(volume: Tensor) -> tuple[float, float]:
        sr, hr = (v.permute(3, 0, 1, 2) for v in (volume, item["target"]))
        metrics = slice_metrics(sr, hr, item["data_range"])
        return float(metrics["psnr"].mean()), float(metrics["ssim"].mean())

    rows = {"zero-filling": figures(item["zero_filling"])}
    for name, image in references(right, with_other["image"].as_tensor()[1:], wrong["subject"]):
        rows[name] = figures(super_resolve(net, torch.cat((upsampled, image)), batch_size, device, name))

    base = rows["zero-filling"]
    table = [dict(zip(COLUMNS, (name, *row, *(a - b for a, b in zip(row, base))))) for name, row in rows.items()]
    print(
        f"{network} ({path}), {target} with {reference}, {found['subject']} at {scale}x, {right.shape[-1]} slices; "
        "mean over slices"
    )
    print_table("reference", "PSNR (dB)", "SSIM", "PSNR over zero-filling (dB)", "SSIM over zero-filling")
    for name, psnr, ssim, over_psnr, over_ssim in (row.values() for row in table):
        print_row(name, f"{psnr:.2f}", f"{ssim:.4f}", f"{over_psnr:+.2f}", f"{over_ssim:+.4f}")
    if output_dir is not None:
        factors = "_".join(f"{factor:g}" for factor in np.atleast_1d(scale))
        write_csv(Path(output_dir) / f"reference_safety_{factors}.csv", table, COLUMNS)


if __name__ == "__main__":
    fire.Fire(main)
