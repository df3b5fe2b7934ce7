"""The report: every panel and slice in one file, the right way round; its controls in a real browser."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from monai.bundle import ConfigWorkflow
from PIL import Image

from glmamba_monai import simulate, super_resolve
from glmamba_monai.__main__ import main
from glmamba_monai.data.phantom import make_subject
from glmamba_monai.metrics import CONVENTIONS
from glmamba_monai.report import INFERNO, write_report

PANELS = ["input", "output", "reference", "truth", "input_error", "output_error"]


def make_volumes(folder, make_subject_folder, make_affine, axis=2, shape=None, seed=5, **affine):
    """Files of a subject with ``axis`` across its slices; the SR is a volume of its own, off by up to 60."""
    size, spacing = [26, 30, 22], [0.9, 0.9, 0.9]
    size[axis], spacing[axis] = 7, 3.0
    grid = make_affine(spacing, **affine)
    written = make_subject_folder(folder / "data", n=1, shape=shape or tuple(size), affine=grid, seed=seed)["sub00"]
    simulate(written["t2"], folder / "lr.nii.gz", 2, axis)
    truth = nib.load(written["t2"])
    off = np.random.default_rng(seed).uniform(-60, 60, truth.shape)
    super_resolved = np.abs(truth.get_fdata() + off).astype(np.float32)
    nib.save(nib.Nifti1Image(super_resolved, truth.affine), folder / "sr.nii.gz")
    return {
        "super_resolved": folder / "sr.nii.gz",
        "low_resolution": folder / "lr.nii.gz",
        "reference": written["t1"],
        "truth": written["t2"],
    }


@pytest.fixture
def volumes(tmp_path, make_subject_folder, make_affine):
    return make_volumes(tmp_path, make_subject_folder, make_affine)


def content(path):
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', path.read_text("utf-8"), re.S)
    return json.loads(text)


def decode(text):
    return Image.open(io.BytesIO(base64.b64decode(text, validate=True)))


def windows(path):
    found = re.findall(r'<figure id="(\w+)">.*?window (\S+) to (\S+?)</span>', path.read_text("utf-8"), re.S)
    return {name: (float(low), float(high)) for name, low, high in found}


def upright(path, axis, index, plane):
    """Slice of a file as rows from the top, by nibabel alone: front or head up, left or back on the right."""
    cut = [slice(None)] * 3
    cut[axis] = slice(index, index + 1)
    canonical = nib.as_closest_canonical(nib.load(path).slicer[tuple(cut)]).get_fdata()  # to R, A, S
    image = np.take(canonical, 0, axis={"sagittal": 0, "coronal": 1, "axial": 2}[plane])
    return image[::-1, ::-1].T


def gray(image, window):
    low, high = window
    return np.clip((image - low) / (high - low), 0, 1) * 255


class Elements(HTMLParser):
    """All elements of a page, as (name, attributes)."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


# --- what it shows


@pytest.mark.parametrize(
    ("axis", "codes", "plane", "letters"),
    [
        (2, "LPS", "axial", "RLAP"),
        (2, "RAS", "axial", "RLAP"),
        (2, "LAS", "axial", "RLAP"),
        (2, "ALI", "axial", "RLAP"),
        (1, "LAS", "coronal", "RLSI"),
        (2, "SRP", "coronal", "RLSI"),
        (0, "RAS", "sagittal", "APSI"),
        (0, "LIP", "sagittal", "APSI"),
        (2, "PSR", "sagittal", "APSI"),
    ],
)
def test_every_slice_of_every_panel_is_the_right_one(
    tmp_path, make_subject_folder, make_affine, axis, codes, plane, letters
):
    files = make_volumes(tmp_path, make_subject_folder, make_affine, axis, codes=codes)
    report = write_report(**files, output=tmp_path / "report.html")
    data = content(report)
    assert list(data["panels"]) == list(data["titles"]) == PANELS
    assert [s["index"] for s in data["slices"]] == list(range(7)) and data["orientation"].startswith(plane)
    found = re.findall(r'<span class="letter (\w+)" aria-hidden="true">(\w)</span>', report.read_text("utf-8"))
    assert len(found) == 4 * 7  # the panels, and the swipe
    assert set(found) == set(zip(("left", "right", "top", "bottom"), letters))
    window = windows(report)
    assert window["input"] == window["output"] == window["truth"] != window["reference"]
    low_resolution = nib.load(files["low_resolution"]).get_fdata()
    assert window["input"] == pytest.approx(np.percentile(low_resolution, (0.5, 99.5)), rel=1e-3, abs=1e-3)
    panels = {"output": "super_resolved", "reference": "reference", "truth": "truth"}
    for n in range(7):
        for name, role in panels.items():
            image = np.asarray(decode(data["panels"][name][n]), dtype=float)
            expected = gray(upright(files[role], axis, n, plane), window[name])
            np.testing.assert_allclose(image, expected, atol=0.7)  # rounded, in a window that is printed rounded
    truth = gray(upright(files["truth"], axis, 3, plane), window["truth"])
    image = np.asarray(decode(data["panels"]["input"][3]), dtype=float)
    straight = np.corrcoef(image.ravel(), truth.ravel())[0, 1]
    assert straight > 0.97
    for mirrored in (truth[::-1], truth[:, ::-1], truth[::-1, ::-1]):
        assert np.corrcoef(image.ravel(), mirrored.ravel())[0, 1] < straight - 0.02
    error = decode(data["panels"]["output_error"][3])
    true_error = np.abs(upright(files["super_resolved"], axis, 3, plane) - upright(files["truth"], axis, 3, plane))
    top = float(re.search(r"\|difference to the truth\|, 0 to (\S+) ", report.read_text("utf-8"))[1])
    assert error.mode == "P"
    np.testing.assert_allclose(np.asarray(error, dtype=float), gray(true_error, (0, top)), atol=0.7)
    palette = np.reshape(error.getpalette(), (-1, 3)).astype(int)
    assert bytes(palette[0].astype(np.uint8)).hex() == INFERNO[0]
    assert bytes(palette[-1].astype(np.uint8)).hex() == INFERNO[-1]
    assert np.all(np.diff(palette @ [2126, 7152, 722]) >= 0)  # a larger error is never darker


def test_figures_are_those_of_the_slice(tmp_path, volumes):
    from skimage.metrics import peak_signal_noise_ratio

    data = content(write_report(**volumes, output=tmp_path / "report.html"))
    truth, found = (nib.load(volumes[name]).get_fdata() for name in ("truth", "super_resolved"))
    for n, part in enumerate(data["slices"]):
        expected = peak_signal_noise_ratio(truth[..., n], found[..., n], data_range=truth.max())
        assert float(re.match(r"PSNR (\S+) dB, SSIM 0\.\d{4}$", part["figures"]["output"])[1]) == pytest.approx(
            expected, abs=0.006
        )


def test_slices_are_evenly_spaced_and_tell_their_place(tmp_path, make_subject_folder, make_affine):
    affine = {"codes": "RAS", "degrees": (0, 0, 0), "origin": (0, 0, -30)}
    files = make_volumes(tmp_path, make_subject_folder, make_affine, shape=(26, 30, 21), **affine)
    report = write_report(**files, output=tmp_path / "report.html", max_slices=5)
    data = content(report)
    assert [part["index"] for part in data["slices"]] == [0, 5, 10, 15, 20]
    assert data["slices"][0]["text"] == "Slice 1 of 21, I 30.0 mm"
    assert data["slices"][4]["text"] == "Slice 21 of 21, S 30.0 mm"
    assert "5 of 21 slices, evenly spaced" in report.read_text("utf-8")
    assert {len(images) for images in data["panels"].values()} == {5}


def test_without_truth_there_is_no_error(tmp_path, volumes):
    del volumes["truth"]
    report = write_report(**volumes, output=tmp_path / "report.html")
    assert list(content(report)["panels"]) == ["input", "output", "reference"]
    text = report.read_text("utf-8")
    assert "PSNR" not in text and "difference to the truth" not in text


def test_an_interpolated_input_on_the_references_matrix_is_shown(tmp_path, volumes):
    volumes["low_resolution"] = volumes["truth"]
    data = content(write_report(**volumes, output=tmp_path / "report.html"))
    assert data["panels"]["input"] == data["panels"]["truth"]
    assert data["slices"][3]["figures"]["input"] == "equal to the truth"


def test_pixels_keep_their_proportions(tmp_path, make_subject_folder, make_affine):
    affine = make_affine((0.5, 1.0, 3.0), codes="LPS")
    written = make_subject_folder(tmp_path / "data", n=1, shape=(40, 24, 3), affine=affine)["sub00"]
    simulate(written["t2"], tmp_path / "lr.nii.gz", 2)
    report = write_report(written["t2"], tmp_path / "lr.nii.gz", written["t1"], tmp_path / "report.html")
    assert decode(content(report)["panels"]["output"][0]).size == (40, 24)
    assert "--ratio: 20 / 24" in report.read_text("utf-8")


def test_one_file_that_asks_for_nothing_else_and_can_be_read_aloud(tmp_path, volumes):
    text = write_report(**volumes, output=tmp_path / "report.html").read_text("utf-8")
    elements = Elements(text).found
    for tag, attributes in elements:
        assert tag not in ("link", "iframe", "object") and not (tag == "script" and "src" in attributes)
        for name in ("src", "href"):
            assert attributes.get(name, "data:image/png;base64,").startswith("data:image/png;base64,")
        if tag == "img":
            assert re.match(r".+, Slice \d+ of \d+, \w \S+ mm, axial, patient's right on the left", attributes["alt"])
        if tag in ("button", "input"):
            assert attributes.get("aria-label")
    assert "url(" not in text and "@import" not in text and "default-src 'none'" in text
    assert ("html", {"lang": "en"}) in elements and "Research use only." in text


def test_a_whole_brain_stays_below_25_mb(tmp_path, make_affine):
    rng = np.random.default_rng(0)
    affine = make_affine((1, 1, 1), codes="LPS")
    noise = rng.integers(1, 1000, (240, 240, 155)).astype(np.float32)  # noise is what cannot be compressed
    nib.save(nib.Nifti1Image(noise, affine), tmp_path / "sr.nii")
    nib.save(nib.Nifti1Image(noise[::-1], affine), tmp_path / "t1.nii")
    simulate(tmp_path / "sr.nii", tmp_path / "lr.nii", 2)
    files = (tmp_path / name for name in ("sr.nii", "lr.nii", "t1.nii"))
    report = write_report(*files, tmp_path / "report.html", truth=tmp_path / "t1.nii")
    assert {len(images) for images in content(report)["panels"].values()} == {40}
    assert 1e6 < report.stat().st_size < 25e6


# --- what it states


def write_metrics(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["subject", "method", "slices", *CONVENTIONS])
        writer.writeheader()
        writer.writerows(rows)
    return path


def metrics_row(subject, method, value):
    return {"subject": subject, "method": method, "slices": 3, **dict.fromkeys(CONVENTIONS, value)}


def test_metrics_of_one_subject_and_of_several(tmp_path, volumes):
    rows = [metrics_row("a", "zero_filling", 30), metrics_row("a", "<net>", 35)]
    one = write_report(**volumes, output=tmp_path / "r.html", metrics=write_metrics(tmp_path / "m.csv", rows))
    text = one.read_text("utf-8")
    assert "m.csv, a</caption>" in text
    assert '<th scope="row">&lt;net&gt;</th><td>35.00</td><td>35.0000</td>' in text
    rows += [metrics_row("b", "zero_filling", 32), metrics_row("b", "<net>", 37)]
    two = write_report(**volumes, output=tmp_path / "r.html", metrics=write_metrics(tmp_path / "m.csv", rows))
    assert "mean ± SD over 2 subjects" in two.read_text("utf-8")
    assert "<td>31.00 ± 1.41</td>" in two.read_text("utf-8")


def test_provenance_is_stated_and_escaped(tmp_path, volumes):
    weights = tmp_path / "model.pt"
    weights.write_bytes(b"weights")
    (tmp_path / "facts.json").write_text('{"Command": "run </script><b>", "Epochs": 40}')
    strange = tmp_path / "a<i>.nii.gz"
    shutil.copy(volumes["super_resolved"], strange)
    volumes["super_resolved"] = strange
    facts = {"weights": weights, "provenance": tmp_path / "facts.json", "command": "glmamba report"}
    text = write_report(**volumes, output=tmp_path / "report.html", **facts).read_text("utf-8")
    import monai
    import torch

    import glmamba_monai

    for word in (glmamba_monai.__version__, monai.__version__, torch.__version__, "glmamba report", "lr.nii.gz"):
        assert word in text
    assert f"model.pt, SHA-256 {hashlib.sha256(b'weights').hexdigest()}" in text
    assert "<dt>Command</dt><dd>run &lt;/script&gt;&lt;b&gt;</dd><dt>Epochs</dt><dd>40</dd>" in text
    assert "a&lt;i&gt;.nii.gz" in text and "<i>" not in text
    assert "<td>13 × 15 × 7</td><td>1.8 × 1.8 × 3</td><td>LPS</td><td>" in text
    assert str(tmp_path) not in text  # folders are named after patients


def write_registration(folder, matrix, used=True):
    """What a registration leaves beside a result, written by SimpleITK and Pillow alone."""
    flip = np.diag([-1.0, -1.0, 1.0, 1.0])
    inverse = flip @ np.linalg.inv(matrix) @ flip
    sitk.WriteTransform(
        sitk.AffineTransform(inverse[:3, :3].ravel().tolist(), inverse[:3, 3].tolist()), str(folder / "r.tfm")
    )
    Image.new("RGB", (30, 20), (255, 0, 0)).save(folder / "r.png")
    facts = {"before": 0.5, "after": 0.61, "move": 2.345, "degrees": 1.5, "used": used, "kind": "rigid"}
    facts |= {"reason": "it <fits>", "transform": "r.tfm" if used else None, "overlay": "r.png" if used else None}
    (folder / "r.json").write_text(json.dumps(facts))
    return folder / "r.json"


def test_a_registration_is_shown_and_the_reference_moved(tmp_path, volumes):
    image = nib.load(volumes["reference"])
    matrix = np.eye(4)
    matrix[:3, 3] = 2 * image.affine[:3, 0]  # by two voxels
    moved = np.zeros(image.shape, np.float32)
    moved[2:] = image.get_fdata()[:-2]
    nib.save(nib.Nifti1Image(moved, image.affine), tmp_path / "moved.nii.gz")
    facts = write_registration(tmp_path, matrix)
    report = write_report(**volumes, output=tmp_path / "report.html", registration=facts)
    volumes["reference"] = tmp_path / "moved.nii.gz"
    expected = write_report(**volumes, output=tmp_path / "expected.html")
    found, wanted = (np.asarray(decode(content(r)["panels"]["reference"][3]), float) for r in (report, expected))
    np.testing.assert_allclose(found[:, 4:-4], wanted[:, 4:-4], atol=1)
    text = report.read_text("utf-8")
    picture = base64.b64encode((tmp_path / "r.png").read_bytes()).decode()
    assert f'src="data:image/png;base64,{picture}"' in text
    assert "2.35 mm (median over the head), 1.50°, rigid" in text or "2.34 mm" in text
    assert "0.500 before, 0.610 after" in text and "yes: it &lt;fits&gt;" in text
    write_registration(tmp_path, matrix, used=False)
    left = write_report(**volumes, output=tmp_path / "left.html", registration=facts)
    assert "no: it &lt;fits&gt;" in left.read_text("utf-8") and 'class="overlay"' not in left.read_text("utf-8")
    assert content(left)["panels"] == content(expected)["panels"]


@pytest.mark.parametrize("codes", ["LPS", "SRA"])
def test_a_result_with_a_resampled_reference_is_shown(tmp_path, volumes, codes):
    """A reference without the outer rows and one slice: the panels are those of the whole pair, cut."""
    image = nib.load(volumes["reference"])
    smaller = image.slicer[4:-4, 2:-2, 1:]
    order = nib.orientations.axcodes2ornt(tuple(codes))
    smaller = smaller.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(smaller.affine), order))
    nib.save(smaller, tmp_path / "t1.nii.gz")
    whole = content(write_report(**volumes, output=tmp_path / "whole.html"))
    volumes["reference"] = tmp_path / "t1.nii.gz"
    super_resolve(volumes["low_resolution"], tmp_path / "t1.nii.gz", tmp_path / "sr.nii.gz", network="zero_filling")
    truth = nib.load(volumes["truth"])
    nib.save(truth.slicer[4:-4, 2:-2, 1:], tmp_path / "truth.nii.gz")
    volumes["truth"] = tmp_path / "truth.nii.gz"
    report = write_report(**volumes, output=tmp_path / "report.html")
    data = content(report)
    assert len(data["slices"]) == 6 and data["slices"][0]["text"].endswith(whole["slices"][1]["text"][-6:])
    window = windows(report)
    for n in range(6):
        for name in ("input", "truth"):
            found, expected = (np.asarray(decode(d["panels"][name][k]), float) for d, k in ((data, n), (whole, n + 1)))
            np.testing.assert_allclose(found, expected[2:-2, 4:-4], atol=1)
        # The output is zero-filling, and so is the input.
        np.testing.assert_allclose(decode(data["panels"]["output"][n]), decode(data["panels"]["input"][n]), atol=1)
        reference = np.asarray(decode(data["panels"]["reference"][n]), float)
        expected = gray(upright(image.get_filename(), 2, n + 1, "axial")[2:-2, 4:-4], window["reference"])
        np.testing.assert_allclose(reference, expected, atol=2)


def test_an_evaluation_writes_a_report_of_each_subject(tmp_path, make_subject_folder):
    written = make_subject_folder(tmp_path / "data", n=2, shape=(24, 28, 9))
    for files in written.values():
        image = nib.load(files["t2"])
        voxels = image.get_fdata(dtype=np.float32)
        voxels[..., :2] = 0
        nib.save(nib.Nifti1Image(voxels, image.affine), files["t2"])
    evaluate(tmp_path / "data", tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out" / "reports").iterdir()) == ["sub00.html", "sub01.html"]
    rows = list(csv.DictReader((tmp_path / "out" / "metrics.csv").open()))
    for subject, files in written.items():
        report = tmp_path / "out" / "reports" / f"{subject}.html"
        data, text = content(report), report.read_text("utf-8")
        assert list(data["panels"]) == PANELS
        (row,) = [r for r in rows if r["subject"] == subject and r["method"] == "zero_filling"]
        assert len(data["slices"]) == int(row["slices"]) == 7 and data["slices"][0]["index"] == 2
        assert f"<td>{float(row['psnr']):.2f}</td>" in text and f"<caption>{subject}</caption>" in text
        for part in data["slices"]:
            assert part["text"].startswith(f"Slice {part['index'] + 1} of 9, ")
        n = len(data["slices"]) // 2
        truth = upright(files["t2"], 2, data["slices"][n]["index"], "axial")
        shown = np.asarray(decode(data["panels"]["truth"][n]), float)
        assert np.corrcoef(truth.ravel(), shown.ravel())[0, 1] > 0.99  # the brightest half per cent is white
        assert "<dt>Weights</dt><dd>none</dd>" in text and "<dt>network</dt><dd>zero_filling</dd>" in text
        values = [float(re.match(r"PSNR (\S+) dB", part["figures"]["output"])[1]) for part in data["slices"]]
        assert np.mean(values) == pytest.approx(float(row["psnr"]), abs=0.006)


def test_an_evaluation_with_registration_shows_it(tmp_path):
    images = make_subject(3, spacing=2.5)
    (tmp_path / "data" / "sub00").mkdir(parents=True)
    moved = np.roll(images["t1"].get_fdata(dtype=np.float32), 2, axis=0)  # by 5 mm; the rim of the volume is air
    nib.save(nib.Nifti1Image(moved, images["t1"].affine), tmp_path / "data" / "sub00" / "t1.nii.gz")
    nib.save(images["t2"], tmp_path / "data" / "sub00" / "t2.nii.gz")
    out = tmp_path / "out"
    evaluate(tmp_path / "data", out, register=True)
    facts = json.loads((out / "reports" / "sub00_registration.json").read_text("utf-8"))
    assert facts["used"] and facts["move"] == pytest.approx(5, abs=0.5)
    text = (out / "reports" / "sub00.html").read_text("utf-8")
    assert '<img class="overlay"' in text and f"{facts['move']:.2f} mm" in text

    evaluate(tmp_path / "data", out)  # what an earlier evaluation has left is not this one's
    assert '<section id="registration">' not in (out / "reports" / "sub00.html").read_text("utf-8")


def evaluate(data, output_dir, **options):
    """``run evaluating --report True`` of zero-filling."""
    folder = Path(__file__).parent.parent / "bundle" / "configs"
    workflow = ConfigWorkflow(
        config_file=[str(folder / "train.json"), str(folder / "evaluate.json")],
        workflow_type="train",
        logging_file=False,
        dataset_dir=str(data),
        output_dir=str(output_dir),
        network="zero_filling",
        evaluate_on="all",
        report=True,
        device="$torch.device('cpu')",
        **options,
    )
    workflow.initialize()
    workflow.run()
    workflow.finalize()


# --- the command line, and errors


@pytest.fixture
def command(monkeypatch, capsys):
    """Run the command line in this process: ``(exit status, stdout, stderr)``."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["glmamba_monai", *map(str, arguments)])
        status = 0
        try:
            main()
        except SystemExit as exit:
            status = exit.code
        return status, *capsys.readouterr()

    return run


def test_command_line(tmp_path, volumes, command):
    output = tmp_path / "new" / "report.html"
    line = ["report", volumes["super_resolved"], "--low-resolution", volumes["low_resolution"]]
    line += ["--reference", volumes["reference"], "--truth", volumes["truth"], "--max-slices", "3", "-o", output]
    status, out, err = command(*line)
    assert status == 0 and out == f"{output}\n", err
    assert [part["index"] for part in content(output)["slices"]] == [0, 3, 6]
    assert "python -m glmamba_monai report" in output.read_text("utf-8")
    assert [p.name for p in output.parent.iterdir()] == ["report.html"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"output": "{tmp}/report.pdf"}, ["{tmp}/report.pdf: the name must end in .html"]),
        ({"output": "{reference}/report.html"}, ["output folder {reference}: cannot be written"]),
        ({"max_slices": 0}, ["max_slices: 0 found, at least 1 expected"]),
        ({"super_resolved": "{tmp}/none.nii.gz"}, ["{tmp}/none.nii.gz: there is no such file"]),
        ({"super_resolved": "{low_resolution}"}, ["{low_resolution}", "(13, 15, 7)", "{reference}", "(26, 30, 7)"]),
        ({"truth": "{moved}"}, ["{moved}", "{super_resolved}", "same matrix but lie up to 5.00 mm apart"]),
        ({"low_resolution": "{reference}", "reference": "{low_resolution}"}, ["{low_resolution}", "(13, 15, 7)"]),
        ({"slice_axis": "up"}, ["slice_axis must be", "'up'"]),
        ({"weights": "{tmp}/none.pt"}, ["weights {tmp}/none.pt: there is no such file"]),
        ({"metrics": "{tmp}/none.csv"}, ["metrics {tmp}/none.csv: there is no such file"]),
        ({"metrics": "{reference}"}, ["metrics {reference}: is no text"]),
        ({"metrics": "{short}"}, ["metrics {short}: found subject, method, psnr; expected", "with ssim, "]),
        ({"metrics": "{words}"}, ["metrics {words}, line 2: psnr is 'high', expected a number"]),
        ({"metrics": "{empty}"}, ["metrics {empty}: found no row; expected metrics.csv of an evaluation"]),
        ({"provenance": "{words}"}, ["provenance {words}: is no JSON", "expected an object of facts"]),
        ({"provenance": "{array}"}, ["provenance {array}: found a list, expected a JSON object"]),
        ({"registration": "{none}"}, ["registration {none}: there is no such file"]),
        ({"registration": "{facts}"}, ["registration {facts}: found before, used; expected the JSON file"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(tmp_path, volumes, change, words):
    truth = nib.load(volumes["truth"])
    moved = truth.affine.copy()
    moved[0, 3] += 5
    nib.save(nib.Nifti1Image(truth.get_fdata(), moved), tmp_path / "moved.nii.gz")
    (tmp_path / "short").write_text("subject,method,psnr\na,b,3\n")
    (tmp_path / "empty").write_text("")
    (tmp_path / "array").write_text("[1]")
    (tmp_path / "facts").write_text('{"before": 1, "used": true}')
    write_metrics(tmp_path / "words", [metrics_row("a", "b", "high")])
    names = {"tmp": tmp_path, "moved": tmp_path / "moved.nii.gz", **volumes}
    names |= {name: tmp_path / name for name in ("short", "empty", "array", "words", "facts", "none")}
    (tmp_path / "report.html").write_text("old")
    before = sorted(tmp_path.rglob("*"))
    arguments = {"output": tmp_path / "report.html", **volumes}
    arguments |= {k: v.format(**names) if isinstance(v, str) else v for k, v in change.items()}
    with pytest.raises((OSError, ValueError)) as caught:
        write_report(**arguments)
    for word in words:
        assert word.format(**names) in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "report.html").read_text() == "old"


# --- in a browser


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    found = (shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome"))
    executable = next(filter(None, found), None)
    if executable is None:
        pytest.skip("needs chromium, chromium-browser or google-chrome")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def opened(browser, tmp_path, volumes):
    """The report in a page; afterwards, nothing was requested and nothing went wrong."""
    report = write_report(**volumes, output=tmp_path / "report.html")
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text))
    page.on("request", lambda request: request.url.startswith(("file:", "data:")) or problems.append(request.url))
    page.goto(report.as_uri())
    yield page, content(report)
    page.close()
    assert problems == []


def shown(page, data):
    """The slice that every image shows, which must be the same one."""
    images = page.eval_on_selector_all("img[data-panel]", "all => all.map(i => [i.dataset.panel, i.src, i.alt])")
    assert len(images) == len(PANELS) + 2
    numbers = set()
    for name, source, alt in images:
        n = data["panels"][name].index(source.removeprefix("data:image/png;base64,"))
        numbers.add(n)
        assert data["slices"][n]["text"] in alt
    (number,) = numbers
    assert page.input_value("#slice") == str(number)
    assert page.inner_text("#where") == data["slices"][number]["text"]
    assert page.get_attribute("#slice", "aria-valuetext") == data["slices"][number]["text"]
    assert page.inner_text("[data-figures=output]") == data["slices"][number]["figures"]["output"]
    return number


def transforms(page):
    """Transform of every image, with its translation in sides of its view."""
    script = """all => all.map(i => { const m = new DOMMatrix(getComputedStyle(i).transform);
        const s = getComputedStyle(i);
        return [m.a, m.e / parseFloat(s.width), m.f / parseFloat(s.height)]; })"""
    return np.array(page.eval_on_selector_all("img[data-panel]", script))


def middle(page, selector):
    box = page.locator(selector).bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, box


def test_slices_by_slider_buttons_keys_and_wheel(opened):
    page, data = opened
    assert shown(page, data) == 3
    page.locator("#slice").fill("5")
    assert shown(page, data) == 5
    page.click("#previous")
    page.click("#previous")
    assert shown(page, data) == 3
    page.click("#next")
    assert shown(page, data) == 4
    page.locator("#slice").focus()
    page.keyboard.press("ArrowRight")  # once, not by the slider and by the page
    assert shown(page, data) == 5
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("ArrowLeft")
    assert shown(page, data) == 4
    page.locator("#truth .view").focus()
    for key, number in (("ArrowUp", 5), ("ArrowDown", 4), ("Home", 0), ("ArrowLeft", 0), ("End", 6), ("ArrowRight", 6)):
        page.keyboard.press(key)
        assert shown(page, data) == number, key
    x, y, _ = middle(page, "#reference .view")
    page.mouse.move(x, y)
    scrolled = page.evaluate("scrollY")
    for turn, number in ((-100, 5), (-100, 4), (100, 5)):
        page.mouse.wheel(0, turn)
        page.wait_for_function(f"document.getElementById('slice').value === '{number}'")
        assert shown(page, data) == number
    assert page.evaluate("scrollY") == scrolled


def test_swipe_by_mouse_and_keys(opened):
    page, _ = opened
    handle, layer = page.locator("#handle"), page.locator(".layer")

    def cut():
        return float(
            re.match(r"inset\(0px 0px 0px ([\d.]+)%\)", layer.evaluate("e => getComputedStyle(e).clipPath"))[1]
        )

    x, y, box = middle(page, "#compare")
    assert cut() == 50
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.2 * box["width"], y, steps=4)
    page.mouse.up()
    assert cut() == pytest.approx(20, abs=0.5) and handle.get_attribute("aria-valuenow") == "20"
    page.mouse.move(x, y)  # let go
    assert cut() == pytest.approx(20, abs=0.5)
    np.testing.assert_allclose(transforms(page), np.tile([1, 0, 0], (8, 1)))  # the line was moved, not the image
    number = page.input_value("#slice")
    handle.focus()
    for key, percent in (("ArrowRight", 22), ("Shift+ArrowRight", 32), ("Home", 0), ("ArrowLeft", 0), ("End", 100)):
        page.keyboard.press(key)
        assert cut() == pytest.approx(percent, abs=0.5), key
    assert page.input_value("#slice") == number
    # What is seen: left of the line the input, right of it the output.
    assert page.get_attribute("#compare > img", "data-panel") == "input"
    assert page.get_attribute(".layer img", "data-panel") == "output"
    page.keyboard.press("Home")
    output_alone = page.locator("#compare").screenshot()
    page.keyboard.press("End")
    assert page.locator("#compare").screenshot() != output_alone


def test_zoom_and_pan_move_every_image_alike(opened):
    page, data = opened

    def same():
        found = transforms(page)
        np.testing.assert_allclose(found, np.tile(found[0], (len(found), 1)), atol=1e-3)
        return found[0]

    page.click("#closer")
    np.testing.assert_allclose(same(), [1.5, -0.25, -0.25], atol=1e-3)
    assert page.inner_text("#magnification") == "1.5×"
    x, y, box = middle(page, "#output .view")
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 0.1 * box["width"], y - 0.2 * box["height"], steps=3)
    page.mouse.up()
    np.testing.assert_allclose(same(), [1.5, -0.15, -0.45], atol=0.01)
    page.locator("#output .view").focus()
    page.keyboard.press("Shift+ArrowRight")
    np.testing.assert_allclose(same(), [1.5, -0.25, -0.45], atol=0.01)
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x - 0.9 * box["width"], y + 0.9 * box["height"], steps=3)
    page.mouse.up()
    np.testing.assert_allclose(same(), [1.5, -0.5, 0], atol=1e-3)  # as far as the edge
    page.keyboard.press("-")
    np.testing.assert_allclose(same(), [1, 0, 0], atol=1e-3)  # never off the edge
    page.keyboard.press("+")
    page.keyboard.press("+")
    assert same()[0] == pytest.approx(2.25)
    page.keyboard.press("0")
    number = shown(page, data)
    page.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + 0.75 * box["height"])
    page.keyboard.down("Control")
    page.mouse.wheel(0, -200)
    page.keyboard.up("Control")
    page.wait_for_function("document.getElementById('magnification').textContent === '2.7×'")
    # What was under the pointer is still there: 0.25 = shift + 2.718 * 0.25
    np.testing.assert_allclose(same(), [np.e, 0.25 * (1 - np.e), 0.75 * (1 - np.e)], atol=0.02)
    assert shown(page, data) == number
    page.click("#whole")
    np.testing.assert_allclose(same(), [1, 0, 0], atol=1e-3)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_in_light_and_dark(opened, scheme):
    page, _ = opened
    page.set_viewport_size({"width": 360, "height": 740})
    page.emulate_media(color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360  # nothing sticks out
    style = page.evaluate("[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]")
    ink, ground = (np.mean([int(v) for v in re.findall(r"\d+", colour)[:3]]) for colour in style)
    assert (ink < 60 and ground > 200) if scheme == "light" else (ink > 200 and ground < 60)
    for view in page.locator(".view").all():
        assert view.bounding_box()["width"] >= 150
    for button in page.locator("button").all():
        assert min(button.bounding_box()[side] for side in ("width", "height")) >= 36
