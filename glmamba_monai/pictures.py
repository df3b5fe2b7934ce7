"""Pictures of segmentations: what every method has made of one slice, with the outlines of the masks."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage
from torch import Tensor

from glmamba_monai.transforms.grid import find_display

PICTURE_ZOOM = 3
TRUTH_COLOUR, PREDICTION_COLOUR = (0, 220, 0), (255, 40, 40)


def draw(
    volumes: Mapping[str, Tensor],
    true: Tensor,
    masks: Mapping[str, Tensor],
    dice: Mapping[str, float],
    affine: np.ndarray,
) -> Image.Image:
    """All methods side by side, in the slice with most of the true mask: its outline green, the predicted one red.

    Args:
        volumes: of one subject, ``{method: (1, X, Y, S)}`` on the CPU; the first sets what is white.
        true: the true mask, ``(1, X, Y, S)``.
        masks: what was segmented in each of the volumes, ``(1, X, Y, S)``.
        dice: of each.
        affine: voxel-to-world matrix of them all, slices last.
    """
    display = find_display(affine)
    index = int(true.sum(dim=(0, 1, 2)).argmax())

    def rows(volume: Tensor) -> np.ndarray:
        return display.rows(volume[0, ..., index].numpy())

    original = rows(next(iter(volumes.values())))
    white = float(np.percentile(original[original > 0], 99.8)) if (original > 0).any() else 1.0
    (box,) = ndimage.find_objects((original > 0.05 * white).astype(np.uint8)) or [(slice(None), slice(None))]
    panels = []
    for method, volume in volumes.items():
        gray = np.clip(rows(volume)[box] / white, 0, 1) * 255
        picture = np.repeat(_zoomed(gray.round().astype(np.uint8))[..., None], 3, axis=2)
        for mask, colour in ((true, TRUTH_COLOUR), (masks[method], PREDICTION_COLOUR)):
            inside = _zoomed(rows(mask)[box] > 0)
            picture[inside & ~ndimage.binary_erosion(inside)] = colour
        panels.append(Image.fromarray(picture))
    width, height = panels[0].size
    sheet = Image.new("RGB", (len(panels) * (width + 6) - 6, height + 22))
    for i, (method, panel) in enumerate(zip(volumes, panels)):
        sheet.paste(panel, (i * (width + 6), 22))
        ImageDraw.Draw(sheet).text((i * (width + 6) + 4, 5), f"{method}, Dice {dice[method]:.3f}", fill="white")
    return sheet


def _zoomed(image: np.ndarray) -> np.ndarray:
    return image.repeat(PICTURE_ZOOM, axis=0).repeat(PICTURE_ZOOM, axis=1)
