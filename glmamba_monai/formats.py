"""Volumes in NRRD, MetaImage (MHA, MHD) and DICOM, by SimpleITK; derived DICOM series are written by pydicom.

World coordinates are those of our affines, RAS in mm; those of these formats, LPS, are used inside this file only.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK as sitk
import torch
from monai.data import MetaTensor
from monai.utils import SpaceKeys

from glmamba_monai.files import save_volume, write_atomically

FORMATS = {
    "NIfTI": (".nii", ".nii.gz", ".hdr", ".img"),
    "NRRD": (".nrrd", ".nhdr"),
    "MetaImage": (".mha", ".mhd"),
    "DICOM": (),  # a folder
}
READABLE = "NIfTI (.nii, .nii.gz), NRRD (.nrrd, .nhdr), MetaImage (.mha, .mhd) or the folder of one DICOM series"
WRITABLE = {"NIfTI": (".nii", ".nii.gz"), "NRRD": (".nrrd",), "MetaImage": (".mha",)}  # one file each
WRITABLE_NAMES = ".nii, .nii.gz, .nrrd or .mha"
# Of the spacing of slices. Headers are rounded; a missing slice makes 1.
UNEQUAL = 0.05
IN_PLANE_SHEAR = 1e-3  # cosine between the rows and columns of a slice that DICOM calls orthogonal
LEVELS = 65535  # of 16 bits, beyond 0
SERIES_NOTE = "super-resolved, research use only"
LONGEST_DESCRIPTION = 64  # characters of a DICOM LO
_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
_POSITION, _ORIENTATION, _PIXEL_SPACING, _SERIES_DESCRIPTION = "0020|0032", "0020|0037", "0028|0030", "0008|103e"
# What no longer holds of a slice with another matrix and other values. GDCM would scale by the real world values.
_OUTDATED = (
    "DigitalSignaturesSequence",
    "IconImageSequence",
    "LargestImagePixelValue",
    "MACParametersSequence",
    "ModalityLUTSequence",
    "PixelAspectRatio",
    "PixelPaddingRangeLimit",
    "PixelPaddingValue",
    "PlanarConfiguration",
    "RealWorldValueMappingSequence",
    "SmallestImagePixelValue",
    "VOILUTFunction",
    "VOILUTSequence",
    "WindowCenterWidthExplanation",
)

PathLike = str | os.PathLike[str]


def file_format(path: PathLike) -> str:
    """The format of a file or folder by its name: a key of ``FORMATS``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: its name is of no format that is read.
    """
    if not str(path):  # Path("") is the folder one is in
        raise ValueError("found an empty name of a file; is a variable of the shell not set?")
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file")
    if path.is_dir():
        return "DICOM"
    for name, suffixes in FORMATS.items():
        if path.name.lower().endswith(suffixes):
            return name
    raise ValueError(f"{path}: found a name that ends in {path.suffix!r}, expected {READABLE}")


def require_readable(path: PathLike) -> None:
    """Make sure, by the headers alone, that a file or folder that is not NIfTI holds one volume.

    Raises:
        FileNotFoundError, ValueError: see :func:`read_volume`.
    """
    if file_format(path) == "DICOM":
        DicomSeries.find(path)
    else:
        _image_header(path)


def read_volume(path: PathLike) -> MetaTensor:
    """Read one volume that is not NIfTI.

    Args:
        path: NRRD or MetaImage file, or the folder of one DICOM series.

    Returns:
        ``(1, X, Y, Z)`` float32, in the units of the file (rescale slope and intercept of DICOM applied).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, holds no 3-D volume of one value a voxel, or a folder does not hold the evenly
            spaced slices of just one series.
    """
    format = file_format(path)
    if format == "DICOM":
        series = DicomSeries.find(path)
        reader, affine = sitk.ImageSeriesReader(), series.affine
        reader.SetFileNames([str(file) for file in series.files])
    else:
        reader = _image_header(path)
        direction = np.reshape(reader.GetDirection(), (3, 3)) * reader.GetSpacing()
        affine = _LPS @ nib.affines.from_matvec(direction, reader.GetOrigin())
    reader.SetOutputPixelType(sitk.sitkFloat32)  # of a series, else that of its first slice, with the others rounded
    with _told_by(path, format):
        voxels = sitk.GetArrayFromImage(reader.Execute())
    volume = torch.from_numpy(np.ascontiguousarray(voxels.T))[None]
    meta = {"filename_or_obj": str(Path(path).expanduser()), "original_affine": affine.copy(), "space": SpaceKeys.RAS}
    return MetaTensor(volume, affine=torch.from_numpy(affine), meta=meta)


@contextlib.contextmanager
def _told_by(path: PathLike, format: str) -> Iterator[None]:
    """Report what SimpleITK raises in one line, and keep its own warnings off the terminal."""
    shown = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].removeprefix("ITK ERROR: ")
        raise ValueError(
            f"{path}: cannot be read as {format} ({reason}); the file is damaged or truncated: copy it again"
        ) from error
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(shown)


def _image_header(path: PathLike) -> sitk.ImageFileReader:
    """The reader of a NRRD or MetaImage file that holds one volume, its header read."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(Path(path).expanduser()))
    with _told_by(path, file_format(path)):
        reader.ReadImageInformation()
    if reader.GetDimension() != 3:
        raise ValueError(
            f"{path}: expected one 3-D volume, found the shape {tuple(reader.GetSize())}; "
            "extract a single volume from it, or make one of all slices"
        )
    _require_one_value(path, reader)
    return reader


def _require_one_value(path: PathLike, reader: sitk.ImageFileReader) -> None:
    if reader.GetNumberOfComponents() != 1:
        raise ValueError(
            f"{path}: expected one value a voxel, found {reader.GetNumberOfComponents()} (colour or vectors); "
            "give the grey-scale volume"
        )


@dataclass(frozen=True)
class DicomSeries:
    """The slices of one DICOM series, in their order in space.

    Attributes:
        files: along the normal of the slices.
        affine: ``(4, 4)``, voxels ``(column, row, slice)`` to world in mm (RAS).
    """

    files: list[Path]
    affine: np.ndarray

    @classmethod
    def find(cls, folder: PathLike) -> DicomSeries:
        """Find the series in a folder by the headers of its files.

        Raises:
            ValueError: the folder holds no DICOM images or those of several series; colour, multi-frame or single
                images, or images of different geometry; or the slices are not evenly spaced.
        """
        files = _files_of_one_series(folder)
        headers = {file: _slice_header(file) for file in files}
        first, *others = files
        if not others:
            raise ValueError(f"{folder}: found one DICOM image, {first.name}, expected the slices of a volume")
        for file in others:
            for what, compared, tolerance in (("Size", 2, 0), ("Spacing", 2, 1e-4), ("Direction", 9, 1e-4)):
                a, b = (np.array(getattr(headers[f], f"Get{what}")()) for f in (first, file))
                if np.abs(a - b)[:compared].max() > tolerance:
                    raise ValueError(
                        f"{folder}: {first.name} and {file.name} differ in {what.lower()}, {_numbers(a)} and "
                        f"{_numbers(b)}; expected the slices of one volume"
                    )
        direction = np.reshape(headers[first].GetDirection(), (3, 3))
        positions = {file: np.array(headers[file].GetOrigin()) for file in files}
        files = sorted(files, key=lambda file: positions[file] @ direction[:, 2])
        step = _even_step(folder, files, np.stack([positions[file] for file in files]))
        matrix = np.column_stack([direction[:, :2] * headers[first].GetSpacing()[:2], step])
        return cls(files, _LPS @ nib.affines.from_matvec(matrix, positions[files[0]]))


def _numbers(values: np.ndarray) -> str:
    return "(" + ", ".join(f"{value:.6g}" for value in values) + ")"


def _files_of_one_series(folder: PathLike) -> list[Path]:
    path = str(Path(folder).expanduser())
    if not os.listdir(path):
        raise ValueError(f"{folder}: found an empty folder, expected the files of one DICOM series")
    with _told_by(folder, "DICOM"):
        series = {
            uid: [Path(file) for file in sitk.ImageSeriesReader.GetGDCMSeriesFileNames(path, uid)]
            for uid in sitk.ImageSeriesReader.GetGDCMSeriesIDs(path)
        }
    if not series:
        raise ValueError(
            f"{folder}: found no DICOM image among its {len(os.listdir(path))} entries, expected the files of one "
            "DICOM series; give the folder that holds the files themselves"
        )
    if len(series) > 1:
        names = "; ".join(f"{_description(files[0])!r} ({len(files)} images, {uid})" for uid, files in series.items())
        raise ValueError(
            f"{folder}: found {len(series)} DICOM series, expected one; copy the files of one into a folder of their "
            f"own. They are {names}"
        )
    (files,) = series.values()
    # GDCM passes over what it cannot read: at an end of the volume, a slice would be lost without a word.
    lost = sorted({file.name for file in Path(path).iterdir() if _is_dicom(file)} - {file.name for file in files})
    if lost:
        raise ValueError(
            f"{folder}: found {', '.join(lost[:3])}{' and others' if lost[3:] else ''} in DICOM that cannot be read as "
            "images, expected images alone; copy damaged files again and move others elsewhere"
        )
    return files


def _is_dicom(file: Path) -> bool:
    if not file.is_file() or file.name.upper() == "DICOMDIR":
        return False
    with open(file, "rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def _dicom_header(file: Path) -> sitk.ImageFileReader:
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(file))
    with _told_by(file, "DICOM"):
        reader.ReadImageInformation()
    return reader


def _description(file: Path) -> str:
    reader = _dicom_header(file)
    if not reader.HasMetaDataKey(_SERIES_DESCRIPTION):
        return "no description"
    return reader.GetMetaData(_SERIES_DESCRIPTION).strip()


def _slice_header(file: Path) -> sitk.ImageFileReader:
    reader = _dicom_header(file)
    _require_one_value(file, reader)
    frames = reader.GetSize()[2] if reader.GetDimension() == 3 else 1
    if frames != 1:
        raise ValueError(
            f"{file}: found {frames} frames (enhanced, multi-frame DICOM), expected one slice a file; "
            "convert it to NIfTI, by dcm2niix for example"
        )
    needed = {"position": _POSITION, "orientation": _ORIENTATION, "pixel spacing": _PIXEL_SPACING}
    missing = [name for name, tag in needed.items() if not reader.HasMetaDataKey(tag)]
    if missing:  # GDCM would fill in (0, 0, 0), the axes and 1 mm
        raise ValueError(
            f"{file}: found no {' and no '.join(missing)} of the slice, expected those of a slice of a volume; "
            "convert enhanced DICOM to NIfTI, by dcm2niix for example"
        )
    return reader


def _even_step(folder: PathLike, files: list[Path], positions: np.ndarray) -> np.ndarray:
    """The vector from slice to slice of ``(S, 3)`` positions."""
    steps = np.diff(positions, axis=0)
    distances = np.linalg.norm(steps, axis=1)
    usual = np.median(steps, axis=0)
    spacing = np.linalg.norm(usual)
    smallest = int(distances.argmin())
    if distances[smallest] <= UNEQUAL * distances.max():
        names = f"{files[smallest].name} and {files[smallest + 1].name}"
        raise ValueError(
            f"{folder}: found two images at one place ({names}), expected one a slice; "
            "keep one echo, phase or time point of the series"
        )
    uneven = np.linalg.norm(steps - usual, axis=1)
    worst = int(uneven.argmax())
    if uneven[worst] > UNEQUAL * spacing:
        raise ValueError(
            f"{folder}: found {files[worst].name} and {files[worst + 1].name} {distances[worst]:.4g} mm apart, "
            f"expected {spacing:.4g} mm as between the other slices: slices are missing, or their spacing is unequal"
        )
    return (positions[-1] - positions[0]) / (len(positions) - 1)


def require_output(output: PathLike, image: PathLike) -> None:
    """Make sure, before any work, that a result can be written under a name; see :func:`save_result`.

    Raises:
        ValueError: the name has an unknown ending, or the output is a folder and there is something in it, the image
            is no DICOM series, or pydicom is not installed.
    """
    path = Path(output)
    if not path.is_dir():
        if _output_format(path) != "DICOM":
            return
        if path.suffix:
            raise ValueError(
                f"output {output}: the name must end in {WRITABLE_NAMES}, found {path.suffix!r}; "
                "the name of a new folder for a DICOM series must have no ending"
            )
    if not Path(image).is_dir():
        raise ValueError(
            f"output {output}: the name must end in {WRITABLE_NAMES}; a folder is written as a DICOM series, for "
            f"which image must be the folder of one, found {image}"
        )
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"output {output}: exists and is not an empty folder; name a new folder for the DICOM series")
    if importlib.util.find_spec("pydicom") is None or int(metadata.version("pydicom").split(".")[0]) < 3:
        raise ValueError(
            f"output {output}: writing a DICOM series needs pydicom, 3.0 or later, which is not installed; "
            f"pip install 'glmamba-monai[dicom]', or name a file that ends in {WRITABLE_NAMES}"
        )


def _output_format(path: PathLike) -> str:
    name = Path(path).name
    return next((format for format, suffixes in WRITABLE.items() if name.endswith(suffixes)), "DICOM")


def sd_path(output: PathLike) -> Path:
    """Where the standard deviation of a result belongs: beside it, in its format, or in NIfTI beside a DICOM series.

    ``sr.nrrd`` has ``sr_sd.nrrd``, the folder ``sr`` has ``sr_sd.nii.gz``.
    """
    path, plain = Path(output), without_ending(output)
    suffix = path.name.removeprefix(plain.name) or ".nii.gz"
    return path.with_name(f"{plain.name}_sd{suffix}")


def without_ending(output: PathLike) -> Path:
    """The name of a result without the ending of its format: that of files beside it begins so."""
    path = Path(output)
    suffix = next((s for suffixes in WRITABLE.values() for s in suffixes if path.name.endswith(s)), "")
    return path.with_name(path.name.removesuffix(suffix))


def save_result(volume: MetaTensor, output: PathLike, image: PathLike) -> Path:
    """Write a result in the format that its name asks for, atomically.

    Args:
        volume: ``(1, X, Y, Z)``.
        output: NIfTI, NRRD or MHA file (float32), or a folder for a derived DICOM series
            (:func:`write_derived_series`).
        image: what was super-resolved; its headers go into a DICOM series.

    Raises:
        OSError: it cannot be written.
        ValueError: the volume's grid cannot be described in DICOM.
    """
    format = _output_format(output)
    if format == "NIfTI":
        return save_volume(volume, output)
    if format == "DICOM":
        return write_derived_series(volume, output, image)
    matrix = (_LPS @ volume.affine.cpu().numpy())[:3]
    spacing = np.linalg.norm(matrix[:, :3], axis=0)
    picture = sitk.GetImageFromArray(volume[0].cpu().numpy().astype(np.float32).T)
    picture.SetSpacing(spacing.tolist())
    picture.SetDirection((matrix[:, :3] / spacing).ravel().tolist())
    picture.SetOrigin(matrix[:, 3].tolist())
    return write_atomically(output, lambda p: sitk.WriteImage(picture, str(p), useCompression=True))


def write_derived_series(volume: MetaTensor, folder: PathLike, source: PathLike) -> Path:
    """Write a volume as a derived secondary DICOM series for research use, a file a slice, atomically.

    Every slice takes the header of the nearest slice of the source (patient, study, acquisition, SOP class), less
    private elements and what no longer holds, with identifiers, geometry and 16-bit values of its own. The arrays are
    stored along the rows, columns and slices of the source as nearly as the volume's grid allows.

    Args:
        volume: ``(1, X, Y, Z)``.
        folder: must not exist or be empty.
        source: folder of the series that the volume was made from.

    Raises:
        OSError: it cannot be written.
        ValueError: the rows and columns of a slice are not orthogonal, or the source is no series.
    """
    import pydicom
    from pydicom.uid import generate_uid

    series = DicomSeries.find(source)
    voxels, affine = _stored_like(volume, series.affine)
    matrix = _LPS @ affine
    spacing = np.linalg.norm(matrix[:3, :3], axis=0)
    row, column, _ = (matrix[:3, :3] / spacing).T
    if abs(row @ column) > IN_PLANE_SHEAR:
        raise ValueError(
            f"output {folder}: the rows and columns of a slice of the reference's grid are at a cosine of "
            f"{abs(row @ column):.3g}, expected orthogonal ones for DICOM; write NIfTI instead"
        )
    normal = np.cross(row, column)
    # The header's slope has 16 characters: the stored values are made with the slope that will be read.
    lowest, highest = float(voxels.min()), float(voxels.max())
    slope, intercept = float(_decimal((highest - lowest) / LEVELS or 1.0)), float(_decimal(lowest))
    stored = np.clip(np.rint((voxels.astype(np.float64) - intercept) / slope), 0, LEVELS).astype("<u2")

    now = datetime.datetime.now()
    headers = [pydicom.dcmread(file, stop_before_pixels=True) for file in series.files]
    places = [np.array(header.ImagePositionPatient, float) @ normal for header in headers]
    uid = generate_uid()
    slices = []
    for number in range(stored.shape[2]):
        position = matrix[:3] @ [0, 0, number, 1]
        template = headers[int(np.abs(np.array(places) - position @ normal).argmin())]
        dataset = _derived(template, uid, number + 1, now)
        dataset.ImagePositionPatient = [_decimal(value) for value in position]
        dataset.ImageOrientationPatient = [_decimal(value) for value in (*row, *column)]
        dataset.PixelSpacing = [_decimal(spacing[1]), _decimal(spacing[0])]
        dataset.SpacingBetweenSlices = _decimal(spacing[2])
        dataset.SliceLocation = _decimal(position @ normal)
        dataset.RescaleSlope, dataset.RescaleIntercept = _decimal(slope), _decimal(intercept)
        dataset.RescaleType = "US"  # unspecified
        dataset.WindowCenter, dataset.WindowWidth = _decimal((lowest + highest) / 2), _decimal(max(highest - lowest, 1))
        dataset.Columns, dataset.Rows = stored.shape[:2]
        dataset.PixelData = np.ascontiguousarray(stored[:, :, number].T).tobytes()
        slices.append(dataset)

    def write(partial: Path) -> None:
        partial.mkdir()
        for number, dataset in enumerate(slices, start=1):
            dataset.save_as(partial / f"{number:04d}.dcm", enforce_file_format=True)

    return write_atomically(folder, write)


def _stored_like(volume: MetaTensor, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``(X, Y, Z)`` and its affine with axes permuted and flipped to those of another affine, nothing resampled."""
    voxels, own = volume[0].cpu().numpy(), volume.affine.cpu().numpy().astype(np.float64)
    orientation = nib.orientations.io_orientation(np.linalg.inv(affine) @ own)
    moved = nib.orientations.apply_orientation(voxels, orientation)
    return moved, own @ nib.orientations.inv_ornt_aff(orientation, voxels.shape)


def _decimal(value: float) -> str:
    """A number in the at most 16 characters of a DICOM DS."""
    from pydicom.valuerep import format_number_as_ds

    return format_number_as_ds(float(value))


def _derived(template: Any, series_uid: str, number: int, now: datetime.datetime) -> Any:
    """The header of a derived slice, without geometry and values."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    from glmamba_monai import __version__

    dataset = Dataset()
    dataset.update(copy.deepcopy(template))
    dataset.remove_private_tags()  # vendors keep geometry and scaling there, which some readers prefer
    for element in [e for e in dataset if e.tag.group & 0xFF00 == 0x6000]:  # overlays have the old matrix
        del dataset[element.tag]
    for keyword in _OUTDATED:
        if keyword in dataset:
            del dataset[keyword]
    source = Dataset()
    source.ReferencedSOPClassUID, source.ReferencedSOPInstanceUID = template.SOPClassUID, template.SOPInstanceUID
    dataset.SourceImageSequence = [source]
    dataset.SOPInstanceUID, dataset.SeriesInstanceUID = generate_uid(), series_uid
    dataset.InstanceNumber = number
    dataset.SeriesNumber = 1000 + int(template.get("SeriesNumber") or 0)
    dataset.ImageType = ["DERIVED", "SECONDARY", *list(template.get("ImageType") or [])[2:]]
    room = LONGEST_DESCRIPTION - len(SERIES_NOTE) - 1
    dataset.SeriesDescription = f"{str(template.get('SeriesDescription', ''))[:room]} {SERIES_NOTE}".strip()
    dataset.DerivationDescription = (
        f"Super-resolved in plane with another contrast by glmamba_monai {__version__}; not for diagnosis, "
        "research use only"
    )
    for name in ("InstanceCreation", "Content", "Series"):
        setattr(dataset, f"{name}Date", now.strftime("%Y%m%d"))
        setattr(dataset, f"{name}Time", now.strftime("%H%M%S"))
    dataset.SamplesPerPixel, dataset.PixelRepresentation = 1, 0
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    return dataset
