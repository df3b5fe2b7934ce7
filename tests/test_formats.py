"""NRRD, MHA and DICOM in and out: the volume that NIfTI gives, at the same place; derived series; what is refused."""

from __future__ import annotations

import importlib.util
import locale
import shutil
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from monai.data import MetaTensor

from glmamba_monai import simulate, super_resolve
from glmamba_monai.__main__ import main
from glmamba_monai.formats import save_result, write_derived_series
from glmamba_monai.networks import build_network
from glmamba_monai.transforms import LoadVolume

needs_pydicom = pytest.mark.skipif(importlib.util.find_spec("pydicom") is None, reason="pydicom is not installed")

MR_IMAGE = "1.2.840.10008.5.1.4.1.1.4"
SLOPE, INTERCEPT = 0.05, -20.0
GRIDS = {
    "oblique": {"codes": "LPS"},
    "LAS": {"codes": "LAS", "degrees": (0, 0, 0)},
    "RAS": {"codes": "RAS", "degrees": (3, -12, 20)},
    "sagittal": {"codes": "PSR", "degrees": (11, -7, 4)},
}
FORMATS = (".nrrd", ".nhdr", ".mha", ".mhd", "")  # the last is a DICOM folder


@pytest.fixture(autouse=True)
def locale_as_it_was():
    """GDCM leaves the locale at C when it writes a slope, which only these tests have it do."""
    before = locale.setlocale(locale.LC_ALL)
    yield
    locale.setlocale(locale.LC_ALL, before)


@pytest.fixture(scope="module", autouse=True)
def gdcm_has_read(tmp_path_factory):
    """Until it has read its first DICOM file, GDCM writes MR slices that have a slope as enhanced ones."""
    path = str(tmp_path_factory.mktemp("gdcm") / "first.dcm")
    sitk.WriteImage(sitk.Image((4, 4), sitk.sitkUInt16), path)
    sitk.ReadImage(path)


def itk_image(path):
    """The NIfTI file as a SimpleITK image, by SimpleITK's own NIfTI reader."""
    return sitk.ReadImage(str(path), sitk.sitkFloat32)


def write_series(folder, image, uid="1.2.826.0.1.1", order=None, keep=None, slope=lambda k: SLOPE, tags=None):
    """Write the slices of a SimpleITK image as MR DICOM files.

    Args:
        order: the number in the file's name and the instance number of slice k.
        keep: the slices to write; None for all.
        slope: the rescale slope of slice k.
        tags: further tags ``{"group|element": value}``, or a function of k that gives them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    direction = np.reshape(image.GetDirection(), (3, 3))
    for k in range(image.GetDepth()) if keep is None else keep:
        number = k if order is None else order[k]
        position = image.TransformIndexToPhysicalPoint((0, 0, k))
        further = tags(k) if callable(tags) else tags or {}
        values = {
            "0008|0008": "ORIGINAL\\PRIMARY\\M\\ND",
            "0008|0016": MR_IMAGE,
            "0008|0018": f"{uid}.{number + 1}",
            "0008|0020": "20240131",
            "0008|0050": "ACC7",
            "0008|0060": "MR",
            "0008|103e": "t2_tse_tra",
            "0010|0010": "Doe^Jane",
            "0010|0020": "P-0042",
            "0010|0030": "19700102",
            "0018|0050": "2.5",
            "0018|0081": "93",
            "0020|000d": "1.2.826.0.1.7",
            "0020|000e": uid,
            "0020|0011": "4",
            "0020|0013": str(number + 1),
            "0020|0032": "\\".join(f"{value:.10g}" for value in position),
            "0020|0037": "\\".join(f"{value:.10g}" for value in direction[:, :2].T.ravel()),
            "0028|0100": "16",
            "0028|0101": "16",
            "0028|0102": "15",
            "0028|0103": "0",
            "0028|1052": f"{INTERCEPT}",
            "0028|1053": f"{slope(k)}",
            **further,
        }
        piece = image[:, :, k]
        for tag, value in values.items():
            if value is not None:
                piece.SetMetaData(tag, value)
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetFileName(str(folder / f"{number:03d}.dcm"))
        writer.Execute(piece)
    return folder


def written_as(path, suffix):
    """The NIfTI file in another format, written by SimpleITK beside it."""
    other = path.with_name(path.name.removesuffix(".nii.gz") + suffix)
    if suffix:
        sitk.WriteImage(itk_image(path), str(other))
        return other
    return write_series(other, itk_image(path))


@pytest.fixture
def pair(tmp_path, make_subject_folder, make_affine):
    """``{"t1", "t2", "lr"}`` on a grid: NIfTI files."""

    def make(grid="oblique"):
        affine = make_affine((0.9, 0.8, 3.0), **GRIDS[grid])
        data = make_subject_folder(tmp_path / "data", n=1, shape=(26, 30, 6), affine=affine)["sub00"]
        lr = data["t2"].with_name("lr.nii.gz")
        simulate(data["t2"], lr, 2)
        return {"lr": lr, **data}

    return make


def write_weights(path):
    network = build_network("srcnn_ref")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    torch.save(network.state_dict(), path)
    return path


def everything_in(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def read_series(folder):
    """``(X, Y, Z)`` and affine (RAS) by SimpleITK alone, in its own order of the slices."""
    reader = sitk.ImageSeriesReader()
    (uid,) = reader.GetGDCMSeriesIDs(str(folder))
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder), uid))
    reader.SetOutputPixelType(sitk.sitkFloat32)
    return as_nifti(reader.Execute())


def as_nifti(image):
    """Array ``(X, Y, Z)`` and affine (RAS) of a SimpleITK image, by its own conversion of points."""
    corner, *ends = (
        np.array(image.TransformIndexToPhysicalPoint(i)) for i in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))
    )
    affine = np.eye(4)
    affine[:3] = np.column_stack([*(end - corner for end in ends), corner])
    affine[:2] *= -1
    return sitk.GetArrayFromImage(image).T, affine


def assert_same_in_world(found, expected, atol):
    """Both are ``(array, affine)``, stored along any axes: each voxel of one is where the other has that value."""
    (array, affine), (other, other_affine) = found, expected
    index = np.indices(array.shape).reshape(3, -1)
    where = np.linalg.solve(other_affine, affine) @ np.vstack([index, np.ones(index.shape[1])])
    np.testing.assert_allclose(where[:3], np.rint(where[:3]), atol=1e-4)
    there = np.rint(where[:3]).astype(int)
    assert array.size == other.size and (there >= 0).all() and (there.max(1) + 1 == other.shape).all()
    np.testing.assert_allclose(array.ravel(), other[tuple(there)], atol=atol)


# --- reading


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_gives_what_nifti_gives(pair, grid, suffix):
    nifti = pair(grid)["t2"]
    path = written_as(nifti, suffix)
    expected = nib.load(nifti)
    volume = LoadVolume()(path)
    assert (
        isinstance(volume, MetaTensor) and volume.dtype == torch.float32 and volume.meta["filename_or_obj"] == str(path)
    )
    if suffix:
        assert volume.shape == (1, *expected.shape)
        np.testing.assert_allclose(volume.affine, expected.affine, atol=1e-5)
        np.testing.assert_array_equal(volume[0].numpy(), expected.get_fdata(dtype=np.float32))
    else:  # slices run along the normal, which for a left-handed grid is the other way round
        assert_same_in_world(
            (volume[0].numpy(), volume.affine.numpy()), (expected.get_fdata(), expected.affine), atol=0.51 * SLOPE
        )
        if np.linalg.det(_lps(expected.affine)[:3, :3]) > 0:
            np.testing.assert_allclose(volume.affine, expected.affine, atol=1e-5)


def _lps(affine):
    return np.diag([-1, -1, 1, 1]) @ affine


def test_slices_are_put_in_their_order_in_space_and_scaled_one_by_one(pair):
    """File names, instance numbers and slopes (Philips, PET) are those of each slice."""
    image = itk_image(pair()["t2"])
    folder = write_series(
        Path(pair()["t2"]).with_name("dicom"), image, order=[3, 0, 5, 1, 4, 2], slope=lambda k: SLOPE * (1 + k)
    )
    (folder / "notes.txt").write_text("beside the slices")
    found = LoadVolume()(folder)
    array, affine = as_nifti(image)
    for k in range(6):
        np.testing.assert_allclose(found[0, ..., k].numpy(), array[..., k], atol=0.51 * SLOPE * (1 + k))
    np.testing.assert_allclose(found.affine, affine, atol=1e-5)


@pytest.mark.parametrize("dtype", [sitk.sitkUInt8, sitk.sitkInt16, sitk.sitkFloat64])
@pytest.mark.parametrize("suffix", [".nrrd", ".mha", ".NRRD"])
def test_other_types_of_values(tmp_path, pair, suffix, dtype):
    image = sitk.Cast(itk_image(pair()["t2"]) / 8, dtype)
    sitk.WriteImage(image, str(tmp_path / "t2.nrrd"))
    if suffix != ".nrrd":
        sitk.WriteImage(image, str(tmp_path / f"t2{suffix.lower()}"))
        (tmp_path / f"t2{suffix.lower()}").rename(tmp_path / f"t2{suffix}")
    expected = sitk.GetArrayFromImage(image).T.astype(np.float32)
    np.testing.assert_array_equal(LoadVolume()(tmp_path / f"t2{suffix}")[0].numpy(), expected)


# --- super-resolution


@pytest.mark.parametrize(
    ("grid", "suffix", "reference_suffix"),
    [
        ("oblique", ".nrrd", ".mha"),
        ("LAS", ".mha", ""),
        ("RAS", "", ".nrrd"),
        ("sagittal", ".mhd", ".nii.gz"),
        ("sagittal", "", ""),
        ("LAS", "", ".nii.gz"),
    ],
)
def test_a_result_does_not_depend_on_the_format(tmp_path, pair, grid, suffix, reference_suffix):
    files = pair(grid)
    options = {"network": "srcnn_ref", "weights": write_weights(tmp_path / "w.pt"), "device": "cpu"}
    expected = super_resolve(files["lr"], files["t1"], **options)
    reference = files["t1"] if reference_suffix == ".nii.gz" else written_as(files["t1"], reference_suffix)
    output = tmp_path / "sr.nii.gz"
    super_resolve(written_as(files["lr"], suffix), reference, output, **options)
    written = nib.load(output)
    stepped = suffix == "" or reference_suffix == ""  # 16 bits, half a step of 0.05 in 1100
    atol = 1.0 if stepped else 1e-2
    assert_same_in_world((written.get_fdata(), written.affine), (expected[0].numpy(), expected.affine.numpy()), atol)
    assert expected.std() > 100 * atol


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
@pytest.mark.parametrize("grid", GRIDS)
def test_results_in_other_formats(tmp_path, pair, grid, suffix):
    files = pair(grid)
    output = tmp_path / "new" / f"sr{suffix}"
    expected = super_resolve(written_as(files["lr"], suffix), files["t1"], output, network="zero_filling")
    array, affine = as_nifti(sitk.ReadImage(str(output)))
    np.testing.assert_array_equal(array, expected[0].numpy())
    np.testing.assert_allclose(affine, expected.affine, atol=1e-5)
    assert [p.name for p in output.parent.iterdir()] == [output.name]
    again = LoadVolume()(output)
    np.testing.assert_array_equal(again.numpy(), expected.numpy())
    np.testing.assert_allclose(again.affine, expected.affine, atol=1e-6)


# --- derived series


@needs_pydicom
@pytest.mark.parametrize("grid", GRIDS)
def test_a_derived_series_is_read_back_by_others(tmp_path, pair, grid):
    import pydicom

    files = pair(grid)
    source = written_as(files["lr"], "")
    output = tmp_path / "derived"
    expected = super_resolve(source, files["t1"], output, network="zero_filling")
    array, affine = read_series(output)
    span = float(expected.max() - expected.min())
    assert_same_in_world((array, affine), (expected[0].numpy(), expected.affine.numpy()), atol=1e-4 * span)
    # Rows and columns run as in the source.
    _, source_affine = read_series(source)
    turned = np.linalg.solve(source_affine[:3, :3], affine[:3, :3])
    np.testing.assert_allclose(turned, np.diag(np.diag(turned)), atol=1e-4)
    assert (np.diag(turned) > 0).all()

    originals = {d.SOPInstanceUID: d for d in map(pydicom.dcmread, sorted(source.iterdir()))}
    derived = [pydicom.dcmread(path) for path in sorted(output.iterdir())]
    assert len(derived) == len(originals) == 6
    assert len({d.SOPInstanceUID for d in derived} | originals.keys()) == 12
    assert len({d.SeriesInstanceUID for d in derived}) == 1
    for number, d in enumerate(derived, start=1):
        (reference,) = d.SourceImageSequence
        original = originals[reference.ReferencedSOPInstanceUID]
        assert d.SeriesInstanceUID != original.SeriesInstanceUID and d.SOPClassUID == original.SOPClassUID == MR_IMAGE
        for name in ("PatientName", "PatientID", "PatientBirthDate", "StudyInstanceUID", "StudyDate", "EchoTime"):
            if name in original:
                assert d[name].value == original[name].value, name
        assert d.PatientName == "Doe^Jane" and d.AccessionNumber == "ACC7"
        assert list(d.ImageType) == ["DERIVED", "SECONDARY", "M", "ND"]
        assert d.SeriesDescription == "t2_tse_tra super-resolved, research use only"
        assert "not for diagnosis" in d.DerivationDescription and d.InstanceNumber == number
        assert d.file_meta.MediaStorageSOPInstanceUID == d.SOPInstanceUID
        assert (d.BitsAllocated, d.BitsStored, d.PixelRepresentation) == (16, 16, 0)
        # The nearest slice of the source gave the header.
        distance = np.linalg.norm(np.subtract(d.ImagePositionPatient, original.ImagePositionPatient).astype(float))
        assert distance < 1.5
        values = d.pixel_array * float(d.RescaleSlope) + float(d.RescaleIntercept)
        spacing = [float(s) for s in d.PixelSpacing]
        np.testing.assert_allclose(spacing, np.linalg.norm(affine[:3, :2], axis=0)[::-1], atol=1e-5)
        assert values.shape == (d.Rows, d.Columns)
        assert np.abs(values - array[..., number - 1].T).max() <= 1e-4 * span
    # Our own reader closes the circle.
    again = LoadVolume()(output)
    np.testing.assert_allclose(again[0].numpy(), array, atol=1e-3)
    np.testing.assert_allclose(again.affine, affine, atol=1e-4)


@needs_pydicom
def test_headers_that_no_longer_hold_are_left_out(tmp_path, pair):
    """Overlays, private elements, padding and lookup tables of the source; the patient's name keeps its letters."""
    import pydicom

    files = pair()
    source = written_as(files["lr"], "")
    for path in source.iterdir():
        d = pydicom.dcmread(path)
        d.SpecificCharacterSet, d.PatientName = "ISO_IR 192", "Müller^Zoë"
        d.add_new((0x6000, 0x0010), "US", 13)
        d.private_block(0x29, "VENDOR", create=True).add_new(0x10, "LO", "geometry of its own")
        d.PixelPaddingValue, d.SmallestImagePixelValue = 0, 7
        mapping = pydicom.Dataset()
        mapping.RealWorldValueSlope, mapping.RealWorldValueIntercept = 100.0, 5.0
        d.RealWorldValueMappingSequence = [mapping]
        d.SeriesDescription = "x" * 64
        d.save_as(path)
    volume = MetaTensor(
        torch.linspace(-5, 900, 26 * 30 * 6).reshape(1, 26, 30, 6), affine=LoadVolume()(files["t1"]).affine
    )
    output = write_derived_series(volume, tmp_path / "derived", source)
    array, affine = read_series(output)
    assert_same_in_world((array, affine), (volume[0].numpy(), volume.affine.numpy()), atol=905e-4)
    for path in output.iterdir():
        d = pydicom.dcmread(path)
        assert d.PatientName == "Müller^Zoë" and len(d.SeriesDescription) == 64
        assert d.SeriesDescription.endswith("x super-resolved, research use only")
        assert not [e for e in d if e.tag.is_private or e.tag.group == 0x6000]
        assert not {"PixelPaddingValue", "SmallestImagePixelValue", "RealWorldValueMappingSequence"} & set(d.dir())


@needs_pydicom
def test_a_failed_series_leaves_nothing_and_an_old_one_is_not_touched(tmp_path, pair, monkeypatch):
    import pydicom

    files = pair()
    source = written_as(files["lr"], "")
    volume = LoadVolume()(files["t2"])
    leftover = tmp_path / "out" / ".partial-derived"  # of a killed process
    leftover.mkdir(parents=True)
    (leftover / "9999.dcm").write_bytes(b"half")
    save, calls = pydicom.Dataset.save_as, []

    def fill(self, *arguments, **options):
        calls.append(arguments)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        save(self, *arguments, **options)

    monkeypatch.setattr(pydicom.Dataset, "save_as", fill)
    with pytest.raises(OSError, match=r"derived: cannot be written .*No space left"):
        save_result(volume, tmp_path / "out" / "derived", source)
    assert len(calls) == 3 and list((tmp_path / "out").iterdir()) == []
    (tmp_path / "out" / "derived").mkdir()  # an empty folder is filled
    save_result(volume, tmp_path / "out" / "derived", source)
    before = everything_in(tmp_path)
    assert len(list((tmp_path / "out" / "derived").iterdir())) == 6
    for folder in (tmp_path / "out" / "derived", source):
        with pytest.raises(ValueError, match="exists and is not an empty folder; name a new folder"):
            super_resolve(source, files["t1"], folder, network="zero_filling")
    assert everything_in(tmp_path) == before


@needs_pydicom
def test_the_command_line_takes_folders(tmp_path, pair, monkeypatch, capsys):
    files = pair()
    source, output = written_as(files["lr"], ""), tmp_path / "derived"
    arguments = ["super-resolve", source, written_as(files["t1"], ".nrrd"), output, "--network", "zero_filling"]
    monkeypatch.setattr(sys, "argv", ["glmamba_monai", *map(str, arguments)])
    main()
    assert capsys.readouterr().out == f"{output}\n" and len(list(output.iterdir())) == 6


def test_a_grid_that_dicom_cannot_describe(tmp_path, pair):
    pytest.importorskip("pydicom")
    files = pair()
    source, volume = written_as(files["lr"], ""), LoadVolume()(files["t2"])
    volume.affine[:3, 0] += 0.1 * volume.affine[:3, 1]
    with pytest.raises(ValueError, match=r"derived: the rows and columns of a slice .* write NIfTI instead"):
        save_result(volume, tmp_path / "derived", source)
    assert not (tmp_path / "derived").exists()


# --- what is refused, before anything is written


def _two_series(image, folder):
    write_series(folder, image)
    write_series(folder, image, uid="1.2.826.0.1.2", order=range(10, 16), tags={"0008|103e": "flair"})


def _colour(image, folder):
    grey = sitk.Cast(sitk.RescaleIntensity(image), sitk.sitkUInt8)
    plain = {"0028|1052": None, "0028|1053": None, "0028|0100": None, "0028|0101": None, "0028|0102": None}
    write_series(folder, sitk.Compose(grey, grey, grey), tags=plain)


def _text_only(image, folder):
    folder.mkdir()
    (folder / "notes.txt").write_text("these are notes")


def _truncated(number, cut):
    def make(image, folder):
        path = write_series(folder, image) / f"{number:03d}.dcm"
        path.write_bytes(path.read_bytes()[:-cut])

    return make


def _placed(height):
    """Straight axial slices, slice k at ``height(k)``."""
    return lambda k: {"0020|0032": f"0\\0\\{height(k)}", "0020|0037": "1\\0\\0\\0\\1\\0"}


def _turned(k):
    return {"0020|0037": "1\\0\\0\\0\\0\\1"} if k == 2 else {}


def _frames(image, folder):
    """All slices in a file, and a second such file."""
    folder.mkdir()
    for number in (1, 2):
        frames = sitk.Cast(image, sitk.sitkUInt16)
        frames.SetMetaData("0020|000e", "1.2.826.0.1.1")
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetFileName(str(folder / f"{number}.dcm"))
        writer.Execute(frames)


BAD_FOLDERS = {
    "empty": (lambda image, folder: folder.mkdir(), ["found an empty folder, expected the files of one DICOM series"]),
    "text": (_text_only, ["found no DICOM image among its 1 entries"]),
    "nested": (
        lambda image, folder: write_series(folder / "s1", image),
        ["found no DICOM image", "the files themselves"],
    ),
    "two series": (
        _two_series,
        ["found 2 DICOM series, expected one", "'t2_tse_tra' (6 images,", "'flair' (6 images, "],
    ),
    "missing slice": (
        lambda image, folder: write_series(folder, image, keep=[0, 1, 3, 4, 5]),
        ["001.dcm and 003.dcm 6 mm apart, expected 3 mm", "slices are missing"],
    ),
    "unequal spacing": (
        lambda image, folder: write_series(folder, image, tags=_placed(lambda k: 3 * k + 1.2 * (k >= 4))),
        ["003.dcm and 004.dcm 4.2 mm apart, expected 3 mm", "spacing is unequal"],
    ),
    "one place": (
        lambda image, folder: write_series(folder, image, tags=_placed(lambda k: 3 * (k // 2))),
        ["found two images at one place", "one echo"],
    ),
    "one image": (lambda image, folder: write_series(folder, image, keep=[2]), ["found one DICOM image, 002.dcm"]),
    "turned": (
        lambda image, folder: write_series(folder, image, tags=_turned),
        ["000.dcm and 002.dcm differ in direction", "expected the slices of one volume"],
    ),
    "colour": (_colour, ["expected one value a voxel, found 3 (colour or vectors)"]),
    "multi-frame": (_frames, ["1.dcm: found 6 frames (enhanced, multi-frame DICOM)", "convert it to NIfTI"]),
    "truncated": (_truncated(3, 400), ["found 003.dcm in DICOM that cannot be read", "copy damaged files again"]),
    "truncated at the end": (_truncated(5, 10), ["found 005.dcm in DICOM that cannot be read"]),
}


def refused(tmp_path, image, reference):
    """What is said of an image; nothing is written, and SimpleITK's own warnings are on again."""
    before = everything_in(tmp_path)
    with pytest.raises(ValueError) as error:
        super_resolve(image, reference, tmp_path / "sr.nii.gz", network="zero_filling")
    assert everything_in(tmp_path) == before and sitk.ProcessObject.GetGlobalWarningDisplay()
    cause = error.value
    with pytest.raises(ValueError, match=r"\w") as error:
        LoadVolume()(image)
    assert str(error.value) == str(cause) and "\n" not in str(cause)
    return str(cause)


@pytest.mark.parametrize("what", BAD_FOLDERS)
def test_folders_that_hold_no_volume(tmp_path, pair, capfd, what):
    files, folder = pair(), tmp_path / "series"
    make, words = BAD_FOLDERS[what]
    make(itk_image(files["lr"]), folder)
    capfd.readouterr()
    message = refused(tmp_path, folder, files["t1"])
    assert message.startswith(str(folder))
    for word in words:
        assert word in message, message
    assert "Warning" not in capfd.readouterr().err


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda i: i[:, :, 2], "expected one 3-D volume, found the shape (13, 15)"),
        (lambda i: sitk.JoinSeries(i, i), "expected one 3-D volume, found the shape (13, 15, 6, 2)"),
        (lambda i: sitk.Compose(i, i, i), "expected one value a voxel, found 3 (colour or vectors)"),
        (lambda i: 0 * i, "every voxel is zero"),
        (lambda i: i / 0, "voxels are NaN or infinite"),
        (None, "cannot be read as"),
        ("text", "cannot be read as"),
    ],
    ids=["2-D", "4-D", "colour", "zero", "inf", "truncated", "text"],
)
def test_files_that_hold_no_volume(tmp_path, pair, suffix, change, words):
    files, path = pair(), tmp_path / f"bad{suffix}"
    image = itk_image(files["lr"])
    if change == "text":
        path.write_text("these are notes, not a volume\n")
    else:
        sitk.WriteImage(image if change is None else change(image), str(path))
    if change is None:
        path.write_bytes(path.read_bytes()[:-2000])
    message = refused(tmp_path, path, files["t1"])
    assert message.startswith(f"{path}: ") and words in message


@pytest.mark.parametrize("name", ["t2.jpg", "t2.dcm", "t2"])
def test_unknown_endings_are_named(tmp_path, pair, name):
    files = pair()
    shutil.copy(files["lr"], tmp_path / name)
    message = refused(tmp_path, tmp_path / name, files["t1"])
    assert message.startswith(f"{tmp_path / name}: found a name that ends in {Path(name).suffix!r}, expected NIfTI")
    assert "the folder of one DICOM series" in message


def test_outputs_that_cannot_be(tmp_path, pair, monkeypatch):
    files = pair()
    source = written_as(files["lr"], "")
    (tmp_path / "taken").write_text("mine")
    before = everything_in(tmp_path)

    def message(image, output):
        with pytest.raises(ValueError, match=r"^output ") as error:
            super_resolve(image, files["t1"], output, network="zero_filling")
        return str(error.value)

    assert "must end in .nii, .nii.gz, .nrrd or .mha, found '.mhd'" in message(files["lr"], tmp_path / "sr.mhd")
    assert "a DICOM series must have no ending" in message(source, tmp_path / "sr.dcm")
    assert f"image must be the folder of one, found {files['lr']}" in message(files["lr"], tmp_path / "derived")
    assert "exists and is not an empty folder" in message(source, tmp_path / "taken")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "needs pydicom" in message(source, tmp_path / "derived")
    assert everything_in(tmp_path) == before
