"""The pair of volumes as callers pass it: to MONAI's bundle, and in the three ways that MONAI Label has."""

from __future__ import annotations

import os
import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform

from glmamba_monai.formats import FORMATS, file_format
from glmamba_monai.transforms.volume import INTERPOLATED_KEY

UPLOAD_KEY = "label"  # under which MONAI Label passes on a second file
STUDIES_VARIABLE = "MONAI_LABEL_STUDIES"  # set by MONAI Label's start_server
THREE_WAYS = (
    "give the reference in one of three ways: as the parameter reference (a path, or in MONAI Label an image id), in "
    "MONAI Label as a second uploaded file under the name label, or in image itself, as a 4-D NIfTI of target and "
    "reference (python -m glmamba_monai pair)"
)

PathLike = str | os.PathLike[str]


def volume_name(path: PathLike) -> str:
    """The name of a volume's file or folder without the ending of its format."""
    endings = "|".join(re.escape(ending) for endings in FORMATS.values() for ending in endings)
    return re.sub(rf"(\.nii\.gz|{endings})$", "", Path(path).name, flags=re.IGNORECASE)


def open_pair(path: PathLike) -> nib.spatialimages.SpatialImage:
    """Open a 4-D NIfTI file (its header only) and make sure that it holds two volumes, target and reference.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or holds one volume or more than two.
    """
    volumes = 1
    if file_format(path) == "NIfTI":
        try:
            image = nib.load(Path(path).expanduser())
        except Exception as error:  # nibabel raises what the layer below happens to raise
            raise ValueError(f"{path}: cannot be read as NIfTI ({error}); copy or convert it again") from error
        volumes = int(np.prod(image.shape[3:]))  # ITK writes the two as a fifth axis
    if volumes == 1:
        raise ValueError(f"{path}: found one volume and no reference, expected two; {THREE_WAYS}")
    if volumes != 2:
        raise ValueError(
            f"{path}: found {volumes} volumes, the shape {tuple(image.shape)}, expected two: the target to "
            f"super-resolve, then the reference; {THREE_WAYS}"
        )
    return image


def read_pair(path: PathLike) -> tuple[MetaTensor, MetaTensor]:
    """Read a 4-D NIfTI file of two volumes.

    Returns:
        Target and reference, both ``(1, X, Y, Z)`` float32.

    Raises:
        FileNotFoundError, ValueError: see :func:`open_pair`; or the file is damaged.
    """
    image = open_pair(path)
    try:
        voxels = np.asarray(image.dataobj, dtype=np.float32).reshape(*image.shape[:3], 2)
    except Exception as error:  # a truncated file has a good header
        raise ValueError(f"{path}: cannot be read as NIfTI ({error}); copy or convert it again") from error
    names = (f"{path} (first volume, target)", f"{path} (second volume, reference)")
    target, reference = (
        MetaTensor(
            torch.from_numpy(np.ascontiguousarray(voxels[None, ..., i])),
            affine=torch.from_numpy(image.affine),
            meta={"filename_or_obj": names[i]},
        )
        for i in range(2)
    )
    return target, reference


class GatherPaird(MapTransform):
    """Find the low-resolution volume and its reference in what a caller has passed, before anything is loaded.

    MONAI's bundle passes two paths, or the path of a 4-D NIfTI file alone. MONAI Label passes its request
    (docs/monailabel.md): the reference is the value of the second key, which is a path or an image id of the studies
    folder; or a second uploaded file; or it lies in a 4-D NIfTI file with the target.

    Sets ``subject``, which names the result, where the caller has not.

    Args:
        keys: of the low-resolution volume and of the reference.

    Raises:
        FileNotFoundError: when called, the image or the reference is not there.
        ValueError: when called, there is no reference.
    """

    def __init__(self, keys: KeysCollection) -> None:
        super().__init__(keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        image_key, reference_key = self.keys
        image = d.get(image_key)
        if not image:  # what MONAI Label makes of an unknown image id
            raise FileNotFoundError(
                f"{image_key}: there is no such image in the studies folder {_studies() or ''}; expected an image id "
                "of it, or an uploaded file"
            )
        reference = d.get(reference_key) or d.get(UPLOAD_KEY)
        if reference:
            d[reference_key] = find_reference(reference)
        else:
            d[image_key], d[reference_key] = read_pair(image)
            d[INTERPOLATED_KEY] = True
        d.setdefault("subject", volume_name(image))
        return d


def find_reference(reference: Any) -> str:
    """The path of a reference that is named by an image id of MONAI Label's studies folder or by a path.

    Raises:
        FileNotFoundError: there is neither.
        ValueError: it is no text.
    """
    if not isinstance(reference, (str, os.PathLike)):
        raise ValueError(f"reference must be a path or an image id, got {reference!r}")
    studies = _studies()
    endings = ["", *(ending for endings in FORMATS.values() for ending in endings)]
    candidates = [studies / f"{reference}{ending}" for ending in endings] if studies else []
    for path in [*candidates, Path(reference).expanduser()]:
        if path.exists():
            return str(path)
    if studies is None:
        raise FileNotFoundError(f"reference {reference}: there is no such file")
    ids = sorted({volume_name(p) for p in studies.iterdir() if p.name.lower().endswith(tuple(filter(None, endings)))})
    raise FileNotFoundError(
        f"reference {reference}: there is no such file on the server, and no such image id in the studies folder "
        f"{studies}; it has {', '.join(ids[:20]) or 'no image'}{', ...' if ids[20:] else ''}"
    )


def _studies() -> Path | None:
    """MONAI Label's folder of images, where the server runs and has one."""
    folder = os.environ.get(STUDIES_VARIABLE, "")
    return Path(folder) if folder and Path(folder).is_dir() else None


class RecordGridd(MapTransform):
    """Note in the meta of the network's input on which grid the result lies, for MONAI Label.

    MONAI Label brings every result to the ``spatial_shape`` and ``original_affine`` that stand there. Those are the
    low-resolution file's.

    Args:
        keys: the result, on the grid that it is to keep.
        image_key: the network's input.
    """

    def __init__(self, keys: KeysCollection, image_key: str) -> None:
        super().__init__(keys)
        self.image_key = image_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        result = d[self.keys[0]]
        affine = result.affine.cpu().numpy()
        d[self.image_key].meta.update(spatial_shape=tuple(result.shape[1:]), original_affine=affine)
        return d
