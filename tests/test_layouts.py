"""The folders of the data sets, found by looking or by name, and JSON datalists."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from glmamba_monai.data import LAYOUTS, find_subjects
from glmamba_monai.data.layouts import contrast_name, read_json_datalist

CONTRASTS = {
    "plain": ("t1", "t2", "pd", "flair", "seg"),
    "brats2021": ("t1", "t1c", "t2", "flair", "seg"),
    "brats2023": ("t1", "t1c", "t2", "flair", "seg"),
    "ixi": ("t1", "t2", "pd"),
}


def touch(root, *names):
    """Empty files: the readers look at names alone."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii"])
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_every_layout_by_looking_and_by_name(tmp_path, make_subject_folder, layout, suffix):
    written = make_subject_folder(
        tmp_path, n=3, layout=layout, contrasts=CONTRASTS[layout], shape=(8, 8, 2), suffix=suffix
    )
    assert find_subjects(tmp_path) == (layout, written)
    assert find_subjects(str(tmp_path), layout) == (layout, written)
    for other in set(LAYOUTS) - {layout}:
        with pytest.raises(FileNotFoundError, match="no subject found"):
            find_subjects(tmp_path, other)


def test_names_as_the_data_sets_publish_them(tmp_path):
    """Spec section 8, written out by hand."""
    examples = {
        "brats2021": [f"BraTS2021_00000/BraTS2021_00000_{c}.nii.gz" for c in ("t1", "t1ce", "t2", "flair", "seg")],
        "brats2023": [
            f"BraTS-GLI-00000-000/BraTS-GLI-00000-000-{c}.nii.gz" for c in ("t1n", "t1c", "t2w", "t2f", "seg")
        ],
        "ixi": ["IXI-T2/IXI002-Guys-0828-T2.nii.gz", "IXI-PD/IXI002-Guys-0828-PD.nii.gz"],
        "plain": [f"patient01/{c}.nii.gz" for c in ("t1", "t2", "pd", "flair", "seg")],
    }
    subjects = {
        "brats2021": "BraTS2021_00000",
        "brats2023": "BraTS-GLI-00000-000",
        "ixi": "IXI002-Guys-0828",
        "plain": "patient01",
    }
    contrasts = {
        "brats2021": ["t1", "t1c", "t2", "flair", "seg"],
        "brats2023": ["t1", "t1c", "t2", "flair", "seg"],
        "ixi": ["t2", "pd"],
        "plain": ["t1", "t2", "pd", "flair", "seg"],
    }
    for layout, names in examples.items():
        touch(tmp_path / layout, *names)
        expected = {c: tmp_path / layout / name for c, name in zip(contrasts[layout], names)}
        assert find_subjects(tmp_path / layout) == (layout, {subjects[layout]: expected})


@pytest.mark.parametrize(
    "given, expected",
    [
        ("T1CE", "t1c"),
        ("t1ce", "t1c"),
        ("t1c", "t1c"),
        ("t1n", "t1"),
        ("T2W", "t2"),
        ("t2f", "flair"),
        ("FLAIR", "flair"),
        ("PD", "pd"),
        ("adc", "adc"),
    ],
)
def test_contrast_aliases(given, expected):
    assert contrast_name(given) == expected


def test_plain_folders_use_the_aliases(tmp_path):
    touch(tmp_path, "a/T1n.nii.gz", "a/T2w.nii.gz", "b/T1CE.nii", "b/FLAIR.nii")
    _, subjects = find_subjects(tmp_path)
    assert {s: sorted(c) for s, c in subjects.items()} == {"a": ["t1", "t2"], "b": ["flair", "t1c"]}


def test_what_is_not_a_volume_is_passed_over(tmp_path, make_subject_folder):
    written = make_subject_folder(tmp_path, n=2, shape=(8, 8, 2))
    touch(tmp_path, "datalist.json", "README.md", "sub00/notes.txt", "sub00/t1.json", "sub00/._t1.nii.gz")
    touch(tmp_path, ".cache/t1.nii.gz", ".cache/t2.nii.gz", "stray.nii.gz", "t1.nii.gz")
    (tmp_path / "empty").mkdir()
    assert find_subjects(tmp_path) == ("plain", written)


def test_the_layout_with_most_files_wins(tmp_path, make_subject_folder):
    written = make_subject_folder(tmp_path, n=2, layout="brats2021", contrasts=("t1", "t2", "seg"), shape=(8, 8, 2))
    touch(tmp_path, "BraTS2021_00000/brain_mask.nii.gz", "extra/t1.nii.gz", "extra/t2.nii.gz")
    assert find_subjects(tmp_path) == ("brats2021", written)
    assert find_subjects(tmp_path, "plain")[1].keys() == {"BraTS2021_00000", "extra"}


def test_the_home_folder_is_expanded(tmp_path, make_subject_folder, monkeypatch):
    make_subject_folder(tmp_path / "data", n=1, shape=(8, 8, 2))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert find_subjects("~/data")[0] == "plain"


def test_unknown_layout_is_named(tmp_path):
    with pytest.raises(ValueError, match="'brats' is unknown; known are auto, brats2021, brats2023, ixi, plain"):
        find_subjects(tmp_path, "brats")


@pytest.mark.parametrize("layout", ["auto", *LAYOUTS])
def test_missing_and_empty_folders_are_named(tmp_path, layout):
    with pytest.raises(FileNotFoundError, match="there is no such folder") as error:
        find_subjects(tmp_path / "missing", layout)
    assert f"dataset_dir {tmp_path / 'missing'}" in str(error.value)
    touch(tmp_path, "file.nii.gz")
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        find_subjects(tmp_path / "file.nii.gz", layout)
    with pytest.raises(FileNotFoundError, match="no subject found; expected files are") as error:
        find_subjects(tmp_path, layout)
    assert f"dataset_dir {tmp_path}" in str(error.value)
    for name in [layout] if layout != "auto" else LAYOUTS:
        assert f"{name}: " in str(error.value)


# --- JSON datalists


def datalist(tmp_path, content):
    path = tmp_path / "lists" / "datalist.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_json_by_contrast(tmp_path):
    path = datalist(
        tmp_path,
        {
            "name": "of my own",
            "training": [
                {"subject": "anna", "t2w": "../data/anna/t2.nii.gz", "T1n": "/abs/anna/t1.nii.gz", "fold": 1},
                {"t2": "ben/t2.nii.gz", "t1": "ben/t1.nii.gz", "age": 61},
            ],
            "validation": [{"subject": "carl", "t2": "carl/t2.nii.gz", "t1": "carl/t1.nii.gz"}],
        },
    )
    assert read_json_datalist(path) == {
        "training": {
            "anna": {"t2": path.parent / "../data/anna/t2.nii.gz", "t1": Path("/abs/anna/t1.nii.gz")},
            "ben_t2": {"t2": path.parent / "ben/t2.nii.gz", "t1": path.parent / "ben/t1.nii.gz"},
        },
        "validation": {"carl": {"t2": path.parent / "carl/t2.nii.gz", "t1": path.parent / "carl/t1.nii.gz"}},
    }


def test_json_by_role_and_as_decathlon_writes_it(tmp_path):
    path = datalist(
        tmp_path,
        {
            "training": [
                {"target": "a/t2.nii.gz", "reference": "a/t1.nii.gz", "subject": "a"},
                {"image": "imagesTr/case_1.nii.gz", "label": "labelsTr/case_1.nii.gz"},
            ],
            "test": ["imagesTs/case_7.nii.gz", {"image": "imagesTs/case_8.nii.gz"}],
        },
    )
    assert read_json_datalist(path) == {
        "training": {
            "a": {"target": path.parent / "a/t2.nii.gz", "reference": path.parent / "a/t1.nii.gz"},
            "imagesTr_case_1": {
                "reference": path.parent / "imagesTr/case_1.nii.gz",
                "target": path.parent / "labelsTr/case_1.nii.gz",
            },
        }
    }


@pytest.mark.parametrize(
    "content, words",
    [
        ("{not json", ["cannot be read as JSON"]),
        ({}, ["at least one item"]),
        ([], ["at least one item"]),
        ({"training": []}, ["at least one item"]),
        ({"test": ["a.nii.gz"]}, ["at least one item"]),
        ({"training": ["a.nii.gz"]}, ["'training'", "'a.nii.gz'", "at least two contrasts"]),
        ({"training": [{"t2": "a.nii.gz", "subject": "anna"}]}, ["anna", "at least two contrasts"]),
        ({"validation": [{"t2": "a/t2.nii.gz", "t1": None}]}, ["'validation'", "at least two contrasts"]),
        (
            {"training": [{"t2": f"{site}/sub1/t2.nii.gz", "t1": f"{site}/sub1/t1.nii.gz"} for site in "AB"]},
            ["'training'", "two items of the name sub1_t2", '"subject"'],
        ),
    ],
)
def test_json_that_is_no_datalist_is_named(tmp_path, content, words):
    path = datalist(tmp_path, content)
    with pytest.raises(ValueError) as error:
        read_json_datalist(path)
    assert str(error.value).startswith(f"datalist {path}: ")
    for word in words:
        assert word in str(error.value)


def test_a_missing_json_is_named(tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match="No such file"):
        read_json_datalist(tmp_path / "missing.json")
