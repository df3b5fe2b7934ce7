"""Files: written to a temporary name and then renamed, so that a crash never leaves half a file under its name."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.config import NdarrayOrTensor
from monai.data import MetaTensor, NibabelWriter
from monai.transforms import SaveImaged


def write_atomically(path: str | os.PathLike[str], write: Callable[[Path], object]) -> Path:
    """Have ``write`` fill a temporary file or make a temporary folder beside ``path``, then rename it to ``path``.

    A folder takes the place of nothing but an empty one.

    Raises:
        OSError: the folder cannot be made or written, or the disk is full. What stood at ``path`` is still there.
    """
    path = Path(path)
    # The suffix stays, since writers choose the format by it; the name is fixed, so that what a killed process has left
    # is overwritten by the next.
    temporary = path.with_name(f".partial-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if temporary.is_dir():  # a file is overwritten, a folder would be added to
            shutil.rmtree(temporary)
        write(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        _discard(temporary)
        raise OSError(
            f"{path}: cannot be written ({error}). Free space or choose another output folder; "
            "nothing that was there before is lost"
        ) from error
    except BaseException:
        _discard(temporary)
        raise
    return path


def _discard(temporary: Path) -> None:
    with contextlib.suppress(OSError):  # the error that brought us here is the one to report
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink()


def write_json(path: str | os.PathLike[str], content: Any) -> Path:
    """Write ``content`` as indented JSON."""
    text = json.dumps(content, indent=2) + "\n"
    return write_atomically(path, lambda p: p.write_text(text, encoding="utf-8"))


def finite(content: Any) -> Any:
    """The same, with None in place of numbers that JSON does not know."""
    if isinstance(content, Mapping):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def write_csv(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> Path:
    """Write some columns of rows, floats with six decimals; what a row lacks stays empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.6f}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    return write_atomically(path, lambda p: p.write_text(text.getvalue(), encoding="utf-8"))


def write_checkpoint(path: str | os.PathLike[str], content: Any) -> Path:
    """Write ``content`` with :func:`torch.save`."""
    return write_atomically(path, lambda p: torch.save(content, p))


def file_stem(name: object) -> str:
    """The beginning of file names for a subject, which stay in the folder that they are written to.

    What separates folders, on any system, becomes an underscore: a datalist's ``site1/01`` is ``site1_01``, where a
    path would make a folder of it, or leave one (``../01``), and MONAI's ``SaveImage`` would take ``01``, as of
    ``site2/01``. All else stays, so ``site1_01`` itself has the same stem.

    Args:
        name: the subject's name, or a number.
    """
    return re.sub(r"[/\\]", "_", str(name))


def require_another(output: str | os.PathLike[str], **inputs: str | os.PathLike[str]) -> None:
    """Make sure that writing the output would not destroy what it is made from.

    Args:
        output: the file to write.
        inputs: the files that are read, by the names of their arguments.

    Raises:
        ValueError: the output is one of them.
    """
    for name, path in inputs.items():
        if os.path.exists(output) and os.path.exists(path) and os.path.samefile(output, path):
            raise ValueError(f"output {output}: is the {name} itself, which would be lost; name another file")


def require_writable(folder: str | os.PathLike[str]) -> Path:
    """Make the folder and prove that a file can be written into it, before any work is done.

    Raises:
        OSError: it cannot.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{os.getpid()}.probe"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise OSError(
            f"output folder {folder}: cannot be written ({error.strerror}); choose another output or output_dir"
        ) from error
    return folder


class AtomicNibabelWriter(NibabelWriter):
    """MONAI's NIfTI writer for ``SaveImage``, writing atomically, with sform and qform both set and units of mm."""

    def set_data_array(self, data_array: NdarrayOrTensor, channel_dim: int | None = 0, **kwargs: Any) -> None:
        """Take ``(1, X, Y, Z)``; a single slice stays ``(X, Y, 1)``, where MONAI would make a 2-D file of it."""
        super().set_data_array(data_array, channel_dim, **{**kwargs, "squeeze_end_dims": False})
        if self.data_obj.shape[-1] == 1:  # the channel, which is last now
            self.data_obj = self.data_obj[..., 0]

    def set_metadata(self, meta_dict: Mapping[str, Any] | None, resample: bool = False, **options: Any) -> None:
        """Take the affine. Nothing is ever resampled, whatever ``resample`` says.

        MONAI 1.6.1 resamples even with ``resample=False``, by the upper left 2x2 of the affine, where the metadata
        does not say that the file had no channel; sagittal and coronal stacks then come out garbled or not at all.
        """
        self.affine = (meta_dict or {}).get("affine", np.eye(4))

    def write(self, filename: str | os.PathLike[str], verbose: bool = False, **kwargs: Any) -> None:
        """Write the image that ``set_data_array`` and ``set_metadata`` have prepared."""
        image = self.create_backend_obj(self.data_obj, affine=self.affine, dtype=self.output_dtype, **kwargs)
        for set_form in (image.set_sform, image.set_qform):
            set_form(np.asarray(image.affine), code=1)
        image.header.set_xyzt_units("mm")
        write_atomically(filename, lambda p: nib.save(image, p))


def save_volume(volume: MetaTensor, path: str | os.PathLike[str]) -> Path:
    """Write ``(1, X, Y, Z)``, or several volumes as 4-D, as a float32 NIfTI file, atomically.

    Raises:
        OSError: it cannot be written.
    """
    writer = AtomicNibabelWriter()
    writer.set_data_array(volume, channel_dim=0)
    writer.set_metadata({"affine": volume.affine}, resample=False)
    writer.write(path)
    return Path(path)


class SaveVolumed(SaveImaged):
    """``SaveImaged`` that writes with :func:`save_volume`; names and folders are its own.

    MONAI's swallows what the writer raises, and reports a full disk as missing libraries.

    Raises:
        OSError: when called, a file cannot be written.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            name = self.saver.fname_formatter(d[key].meta, self.saver)
            save_volume(d[key], self.saver.folder_layout.filename(**name))
        return d
