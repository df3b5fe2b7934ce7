"""Known rigid moves of a real volume, and how well they are found again.

python benchmarks/registration.py --dataset_dir DATA --subjects "['patient07']"
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import fire
import numpy as np
import torch
from monai.data import MetaTensor
from nibabel import affines
from scipy.spatial.transform import Rotation
from timing import print_row, print_table
from tqdm import tqdm

from glmamba_monai.data import dataset_or_demo, find_items
from glmamba_monai.registration import register
from glmamba_monai.transforms import KSpaceLowResolution, LoadVolume, PairOnGridd
from glmamba_monai.transforms.volume import foreground

MOVES = ((1, 0), (2, 1), (5, 5), (10, 0), (0, 10), (10, 10))  # mm and degrees, about the middle of the head


def rigid(millimetres: float, degrees: float, centre: np.ndarray, seed: int) -> np.ndarray:
    """World matrix ``(4, 4)``: a turn about a random axis through ``centre``, then a shift in a random direction."""
    axis, shift = np.random.default_rng(seed).normal(size=(2, 3))
    turn = Rotation.from_rotvec(np.deg2rad(degrees) * axis / np.linalg.norm(axis)).as_matrix()
    return affines.from_matvec(turn, centre - turn @ centre + millimetres * shift / np.linalg.norm(shift))


def moved_again(moving: MetaTensor, fixed: MetaTensor, seed: int) -> tuple[list[float], float, float, int, float]:
    """Move a volume by each of :data:`MOVES`, and register it.

    The move is one of its header: no voxel is interpolated. The error is that to the known move, taking the two to lie
    on each other before it; contrasts of one session may lie apart, by about what is found without a move.

    Returns:
        Median target error in mm over the head for each move; the largest distance, median over the head, of what one
        move leads to from the mean over the moves; what is found without a move in mm; how many registrations were
        used; and seconds a registration.
    """
    masks = foreground(moving), foreground(fixed)
    points = affines.apply_affine(moving.affine.numpy(), np.argwhere(masks[0][0].numpy())[::997])
    start = time.perf_counter()
    unmoved = register(moving, fixed, *masks)
    ends, used = [], 0
    for number, (millimetres, degrees) in enumerate(MOVES):
        move = rigid(millimetres, degrees, points.mean(axis=0), seed + number)
        displaced = MetaTensor(moving.as_tensor(), affine=torch.from_numpy(move) @ moving.affine)
        found = register(displaced, fixed, *masks)
        used += found.used
        ends.append(affines.apply_affine(found.matrix @ move, points))
    seconds = (time.perf_counter() - start) / (len(MOVES) + 1)
    errors, apart = (
        np.median(np.linalg.norm(np.stack(ends) - truth, axis=2), axis=1) for truth in (points, np.mean(ends, axis=0))
    )
    return errors.tolist(), float(apart.max()), unmoved.move, used, seconds


def main(
    dataset_dir: str,
    subjects: Sequence[str] | None = None,
    target: str = "t2",
    reference: str = "t1",
    scale: float = 2,
    seed: int = 0,
) -> None:
    """Print a table: the reference moved, and registered to itself and to the low-resolution target.

    Args:
        dataset_dir: data set of pairs on one grid.
        subjects: which of them; None for all.
        target: contrast to register to, in low resolution.
        reference: contrast to move.
        scale: factor of the low resolution.
        seed: of the moves' directions.
    """
    torch.set_num_threads(1)
    datalist, _ = find_items(dataset_or_demo(dataset_dir), target, reference)
    items = [item for section in datalist.values() for item in section]
    columns = ("median error (mm)", "worst move (mm)", "from each other (mm)", "unmoved (mm)", "used", "seconds")
    print_table("subject", "registered to", *columns)
    for item in tqdm([item for item in items if subjects is None or item["subject"] in subjects], disable=None):
        pair = {role: LoadVolume()(item[role]) for role in ("target", "reference")}
        pair = PairOnGridd(["target", "reference"])(pair)
        low = KSpaceLowResolution(scale)(pair["target"])
        for name, fixed in ((reference, pair["reference"]), (f"{target}, {scale:g}x lower", low)):
            errors, apart, unmoved, used, seconds = moved_again(pair["reference"], fixed, seed)
            numbers = [f"{v:.2f}" for v in (np.median(errors), max(errors), apart, unmoved)]
            print_row(item["subject"], name, *numbers, f"{used} of {len(errors)}", f"{seconds:.1f}")


if __name__ == "__main__":
    fire.Fire(main)
