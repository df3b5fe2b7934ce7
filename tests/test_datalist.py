"""Pairs and splits: by patient, seeded, written down, and nothing written when something is wrong."""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path

import numpy as np
import pytest

from glmamba_monai.data import (
    at_factors,
    contrast_items,
    dataset_or_demo,
    evaluation_items,
    find_items,
    inference_items,
    split_subjects,
    write_datalist,
)
from glmamba_monai.data import datalist as module
from glmamba_monai.data.datalist import pair_contrasts, patient_of, require_paired_grids

SMALL = (8, 9, 3)


def names(items):
    return [item["subject"] for item in items]


def warnings_of(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def prepare_datalist(dataset_dir, output_dir, *arguments, **options):
    """The split, written down as the configs do; without the arguments it was made with, which the file has."""
    datalist = module.prepare_datalist(dataset_dir, output_dir, *arguments, **options)
    write_datalist(datalist, output_dir)
    return {name: datalist[name] for name in ("training", "validation")}


def everything_under(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


# --- splits


@pytest.mark.parametrize(
    "subject, patient",
    [
        ("BraTS-GLI-00012-001", "BraTS-GLI-00012"),
        ("BraTS-GLI-00012-000", "BraTS-GLI-00012"),
        ("BraTS-MEN-00012-000", "BraTS-MEN-00012"),
        ("BraTS2021_00012", "BraTS2021_00012"),
        ("patient01_study2", "patient01"),
        ("patient12_study1", "patient12"),
        ("sub-01_ses-02", "sub-01"),
        ("anna-visit3", "anna"),
        ("IXI002-Guys-0828", "IXI002-Guys-0828"),
        ("Brats18_CBICA_AAB_1", "Brats18_CBICA_AAB_1"),
        ("study1", "study1"),
        # as read_json_datalist names items
        ("patient01_study2_t2", "patient01"),
        ("BraTS-GLI-00012-001_BraTS-GLI-00012-001-t2w", "BraTS-GLI-00012"),
        ("imagesTr_BraTS-GLI-00012-001-t2w", "imagesTr_BraTS-GLI-00012"),
        ("anat_sub-01_ses-02_T2w", "anat_sub-01"),
    ],
)
def test_whose_scan_it_is(subject, patient):
    assert patient_of(subject) == patient


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("patients", [2, 5, 23])
def test_a_fraction_of_the_patients_is_held_out(fraction, patients):
    subjects = [f"patient{p:02d}_study{s}" for p in range(patients) for s in range(1, 2 + p % 3)]
    held_out_patients = max(1, round(fraction * patients))
    if held_out_patients == patients:
        with pytest.raises(ValueError, match="at least one more patient"):
            split_subjects(subjects, fraction)
        return
    training, held_out = split_subjects(subjects, fraction, seed=1)
    assert sorted(training + held_out) == sorted(subjects)
    assert training == sorted(training) and held_out == sorted(held_out)
    assert not {s[:9] for s in training} & {s[:9] for s in held_out}
    assert len({s[:9] for s in held_out}) == held_out_patients


def test_the_seed_alone_decides():
    subjects = [f"sub{i:03d}" for i in range(40)]
    shuffled = list(np.random.default_rng(0).permutation(subjects))
    np.random.seed(5)
    first = split_subjects(subjects, seed=3)
    np.random.seed(6)
    assert split_subjects(shuffled, seed=3) == first
    assert len(first[1]) == 8  # a fifth by default
    assert len({tuple(split_subjects(subjects, seed=s)[1]) for s in range(10)}) == 10


def test_every_patient_may_be_held_out():
    subjects = [f"sub{i}" for i in range(5)]
    assert {split_subjects(subjects, seed=s)[1][0] for s in range(60)} == set(subjects)


def test_named_subjects_are_held_out_with_their_patients():
    subjects = ["patient01_study1", "patient01_study2", "patient02_study1", "patient03_study1"]
    for named in (["patient01_study2"], "patient01_study2", ("patient01",), "patient01"):
        training, held_out = split_subjects(subjects, named)
        assert held_out == subjects[:2] and training == subjects[2:]
    assert split_subjects(subjects, ["patient03_study1", "patient01"])[0] == ["patient02_study1"]


@pytest.mark.parametrize(
    "validation, words",
    [
        (0, "fraction between 0 and 1 or a list of subjects, got 0"),
        (1, "got 1"),
        (1.5, "got 1.5"),
        (-0.2, "got -0.2"),
        (float("nan"), "got nan"),
        (["sub1", "sub9"], "validation names sub9; the subjects are sub1, sub2, sub3"),
        ("sub9", "validation names sub9"),
        ([], "empty"),
        (["sub1", "sub2", "sub3"], "3 held out"),
        (0.99, "3 held out"),
    ],
)
def test_impossible_splits_are_named(validation, words):
    with pytest.raises(ValueError, match=words):
        split_subjects(["sub1", "sub2", "sub3"], validation)


def test_one_patient_cannot_be_split():
    with pytest.raises(ValueError, match=r"1 patient.* \(patient01\) and 1 held out"):
        split_subjects(["patient01_study1", "patient01_study2"])


# --- pairs


def images(*contrasts):
    return {c: Path(f"/data/{c}.nii.gz") for c in contrasts}


def test_pairs_and_their_labels():
    items = pair_contrasts({"b": images("t1", "t2", "seg"), "a": images("t1", "t2", "pd")}, "T2W", "t1n", True)
    assert items == [
        {"subject": "a", "target": "/data/t2.nii.gz", "reference": "/data/t1.nii.gz"},
        {"subject": "b", "target": "/data/t2.nii.gz", "reference": "/data/t1.nii.gz", "seg": "/data/seg.nii.gz"},
    ]
    roles = pair_contrasts({"a": images("target", "reference")}, "t2", "t1", False)
    assert roles == [{"subject": "a", "target": "/data/target.nii.gz", "reference": "/data/reference.nii.gz"}]


def test_incomplete_subjects_are_left_out_or_refused(caplog):
    subjects = {"anna": images("t1", "t2"), "ben": images("t2", "flair"), "carl": images("flair")}
    with caplog.at_level(logging.INFO):
        assert names(pair_contrasts(subjects, "t2", "t1", skip_incomplete=True)) == ["anna"]
    assert warnings_of(caplog) == [
        "subject ben has no reference (t1); it has flair, t2: left out",
        "subject carl has no target (t2) and no reference (t1); it has flair: left out",
    ]
    with pytest.raises(FileNotFoundError, match=r"subject ben has no reference \(t1\); it has flair, t2"):
        pair_contrasts(subjects, "t2", "t1", skip_incomplete=False)


def test_an_unknown_contrast_is_one_clear_error(caplog):
    """And not a warning a subject in front of it."""
    subjects = {f"sub{i}": images("t1", "t2", "seg") for i in range(50)}
    with pytest.raises(ValueError) as error:
        pair_contrasts(subjects, "t9", "t1", skip_incomplete=True)
    assert "target 't9' and reference 't1'" in str(error.value)
    assert "the contrasts found are seg, t1, t2" in str(error.value)
    assert not caplog.records


@pytest.mark.parametrize("target, reference", [("t2", "t2"), ("t2", "T2w"), ("t1ce", "t1c")])
def test_two_different_contrasts_are_needed(target, reference):
    with pytest.raises(ValueError, match=f"target and reference are both '{target}'"):
        pair_contrasts({"a": images("t1", "t2", "t1c")}, target, reference, True)


# --- a data set


@pytest.mark.parametrize("layout", ["plain", "brats2021", "brats2023"])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_data_set_is_split_and_the_split_written(tmp_path, make_subject_folder, layout, suffix):
    contrasts = ("t1", "t2", "seg")
    written = make_subject_folder(
        tmp_path / "data", n=5, layout=layout, contrasts=contrasts, shape=SMALL, suffix=suffix
    )
    datalist = prepare_datalist(tmp_path / "data", tmp_path / "out", "t2", "t1", validation=0.4, seed=7)
    assert len(datalist["training"]) == 3 and len(datalist["validation"]) == 2
    assert [names(datalist[s]) for s in ("training", "validation")] == [*split_subjects(list(written), 0.4, 7)]
    for item in datalist["training"] + datalist["validation"]:
        files = written[item["subject"]]
        expected = {"target": files["t2"], "reference": files["t1"], "seg": files["seg"]}
        assert item == {"subject": item["subject"], **{k: str(v) for k, v in expected.items()}}
    content = json.loads((tmp_path / "out" / "datalist.json").read_text())
    assert {s: content[s] for s in ("training", "validation")} == datalist
    assert content["made_with"] == {
        "dataset_dir": str(tmp_path / "data"),
        "target": "t2",
        "reference": "t1",
        "layout": "auto",
        "validation": 0.4,
        "seed": 7,
    }
    assert everything_under(tmp_path / "out") == ["datalist.json"]


def test_paths_are_absolute_wherever_one_stands(tmp_path, make_subject_folder, monkeypatch):
    make_subject_folder(tmp_path / "data", n=2, shape=SMALL)
    monkeypatch.chdir(tmp_path)
    relative = prepare_datalist("data", "out", "t2", "t1")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert relative == prepare_datalist("../data", "out", "t2", "t1")
    for item in relative["training"] + relative["validation"]:
        for role in ("target", "reference"):
            assert os.path.isabs(item[role]) and ".." not in item[role] and Path(item[role]).is_file()
    # and so a split is recognised from another folder
    assert prepare_datalist(tmp_path / "data", tmp_path / "out", "t2", "t1", keep_split=True) == relative


def test_keep_split_outlives_a_growing_folder(tmp_path, make_subject_folder, caplog):
    def prepare(**kwargs):
        return prepare_datalist(tmp_path / "data", tmp_path / "out", "t2", "t1", seed=2, **kwargs)

    make_subject_folder(tmp_path / "data", names=["c", "d", "e", "f", "g"], shape=SMALL)
    first = prepare(keep_split=True)  # nothing to keep yet
    make_subject_folder(tmp_path / "data", names=["a", "b", "h", "i", "j", "k"], shape=SMALL)
    assert prepare(keep_split=True) == first
    assert not warnings_of(caplog)
    fresh = prepare()
    assert len(fresh["training"] + fresh["validation"]) == 11
    assert prepare(keep_split=True) == fresh


@pytest.mark.parametrize("change", [{"seed": 3}, {"validation": 0.5}, {"layout": "plain"}, {"validation": ["c"]}])
def test_keep_split_holds_out_who_was_held_out_whatever_is_asked_now(tmp_path, make_subject_folder, change):
    make_subject_folder(tmp_path / "data", names=list("abcdef"), shape=SMALL)
    arguments = {"dataset_dir": tmp_path / "data", "output_dir": tmp_path / "out", "target": "t2", "reference": "t1"}
    trained = prepare_datalist(**arguments)
    assert prepare_datalist(**{**arguments, **change}, keep_split=True) == trained


def test_keep_split_of_other_contrasts_splits_anew_and_says_so(tmp_path, make_subject_folder, caplog):
    make_subject_folder(tmp_path / "data", names=list("abcdef"), shape=SMALL)
    arguments = {"dataset_dir": tmp_path / "data", "output_dir": tmp_path / "out"}
    prepare_datalist(**arguments, target="t2", reference="t1")
    other = prepare_datalist(**arguments, target="t1", reference="t2", keep_split=True)
    assert other["validation"][0]["target"].endswith("t1.nii.gz")
    assert "target='t1', was 't2'" in caplog.text


def test_a_split_follows_a_data_set_that_has_moved(tmp_path, make_subject_folder, caplog):
    make_subject_folder(tmp_path / "data", names=list("abcdef"), shape=SMALL)
    trained = prepare_datalist(tmp_path / "data", tmp_path / "out", "t2", "t1", validation=["c", "d"])
    (tmp_path / "data").rename(tmp_path / "moved")
    found = prepare_datalist(tmp_path / "moved", tmp_path / "out", "t2", "t1", keep_split=True)
    assert names(found["validation"]) == names(trained["validation"]) == ["c", "d"]
    assert not warnings_of(caplog)


def test_a_kept_split_is_checked_again(tmp_path, make_subject_folder):
    written = make_subject_folder(tmp_path / "data", n=3, shape=SMALL)
    prepare_datalist(tmp_path / "data", tmp_path / "out", "t2", "t1")
    written["sub01"]["t1"].unlink()
    with pytest.raises(FileNotFoundError, match="sub01"):
        prepare_datalist(tmp_path / "data", tmp_path / "out", "t2", "t1", keep_split=True)


@pytest.mark.parametrize("content", ["{half a fi", "[]", '{"training": [], "validation": []}', '{"made_with": {}}'])
def test_a_damaged_split_is_named_and_not_overwritten(tmp_path, make_subject_folder, content):
    make_subject_folder(tmp_path / "data", n=3, shape=SMALL)
    (tmp_path / "out").mkdir()
    file = tmp_path / "out" / "datalist.json"
    file.write_text(content)
    with pytest.raises(ValueError) as error:
        prepare_datalist(tmp_path / "data", tmp_path / "out", "t2", "t1", keep_split=True)
    assert str(error.value).startswith(f"{file}: ") and "remove it" in str(error.value)
    assert file.read_text() == content


def test_a_subject_without_its_reference(tmp_path, make_subject_folder, caplog):
    written = make_subject_folder(tmp_path / "data", n=4, shape=SMALL)
    written["sub02"]["t1"].unlink()
    datalist = prepare_datalist(tmp_path / "data", tmp_path / "out", "t2", "t1")
    assert sorted(names(datalist["training"] + datalist["validation"])) == ["sub00", "sub01", "sub03"]
    assert warnings_of(caplog) == ["subject sub02 has no reference (t1); it has t2: left out"]
    with pytest.raises(FileNotFoundError, match=r"subject sub02 has no reference \(t1\); it has t2"):
        inference_items(None, "t1", tmp_path / "data", "t2")


def test_ixi(tmp_path, make_subject_folder):
    make_subject_folder(tmp_path / "data", n=3, layout="ixi", contrasts=("t1", "t2", "pd"), shape=SMALL)
    datalist = prepare_datalist(tmp_path / "data", tmp_path / "out", "t2", "pd")
    assert len(datalist["training"]) == 2
    for target, reference in (("t2", "t1"), ("T1", "pd")):
        with pytest.raises(ValueError, match=r"another grid.* registered first; use --target t2 --reference pd"):
            prepare_datalist(tmp_path / "data", tmp_path / "other", target, reference)
        with pytest.raises(ValueError, match="another grid"):
            inference_items(None, reference, tmp_path / "data", target)
    assert not (tmp_path / "other").exists()


def break_nothing_paired(root, make_volume):
    for path in root.glob("*/t1.nii.gz"):
        path.unlink()


def break_to_4d(root, make_volume):
    make_volume(root / "sub01" / "t1.nii.gz", np.ones((*SMALL, 2)))


def break_to_2d(root, make_volume):
    make_volume(root / "sub01" / "t2.nii.gz", np.ones(SMALL[:2]))


def break_matrix(root, make_volume):
    make_volume(root / "sub01" / "t1.nii.gz", np.ones((8, 9, 4)))


def break_place(root, make_volume):
    make_volume(root / "sub01" / "t1.nii.gz", np.ones(SMALL), np.diag([2.0, 2, 2, 1]))


def break_to_text(root, make_volume):
    (root / "sub01" / "t1.nii.gz").write_text("no volume")


def break_header(root, make_volume):
    path = root / "sub01" / "t1.nii.gz"
    path.write_bytes(path.read_bytes()[:30])


@pytest.mark.parametrize(
    "break_it, words",
    [
        (break_nothing_paired, ["no subject has both target 't2' and reference 't1'", "contrasts found are t2"]),
        (break_to_4d, ["sub01/t1.nii.gz: expected one 3-D volume, found the shape (8, 9, 3, 2)"]),
        (break_to_2d, ["sub01/t2.nii.gz: expected one 3-D volume, found the shape (8, 9)"]),
        (break_matrix, ["sub01/t2.nii.gz has the matrix (8, 9, 3)", "sub01/t1.nii.gz has (8, 9, 4)", "register"]),
        (break_place, ["sub01/t2.nii.gz", "sub01/t1.nii.gz", "mm apart"]),
        (break_to_text, ["sub01/t1.nii.gz: cannot be read as NIfTI"]),
        (break_header, ["sub01/t1.nii.gz: cannot be read as NIfTI"]),
    ],
)
def test_nothing_is_written_when_something_is_wrong(tmp_path, make_subject_folder, make_volume, break_it, words):
    make_subject_folder(tmp_path / "data", n=3, shape=SMALL)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "datalist.json").write_text("of an earlier run")
    break_it(tmp_path / "data", make_volume)
    before = everything_under(tmp_path)
    with pytest.raises(ValueError) as error:
        prepare_datalist(tmp_path / "data", tmp_path / "out", "t2", "t1")
    for word in words:
        assert word in str(error.value)
    assert everything_under(tmp_path) == before
    assert (tmp_path / "out" / "datalist.json").read_text() == "of an earlier run"


@pytest.mark.parametrize("folder", ["missing", "empty"])
def test_missing_and_empty_data_sets_are_named(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=re.escape(f"dataset_dir {tmp_path / folder}: ")):
        prepare_datalist(tmp_path / folder, tmp_path / "out", "t2", "t1")
    assert everything_under(tmp_path) == ["empty"]


def test_an_output_folder_that_cannot_be_written(tmp_path, make_subject_folder):
    make_subject_folder(tmp_path / "data", n=2, shape=SMALL)
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError, match=r"file/out/datalist\.json: cannot be written"):
        prepare_datalist(tmp_path / "data", tmp_path / "file" / "out", "t2", "t1")


def test_paired_grids_need_their_files(tmp_path, make_subject_folder):
    files = make_subject_folder(tmp_path, n=1, shape=SMALL)["sub00"]
    item = {"subject": "sub00", "target": str(files["t2"]), "reference": str(tmp_path / "nowhere.nii.gz")}
    with pytest.raises(FileNotFoundError, match=r"nowhere\.nii\.gz: there is no such file"):
        require_paired_grids([item])
    require_paired_grids([{**item, "reference": str(files["t1"])}])


def test_the_headers_are_enough(tmp_path, make_subject_folder):
    """Thousands of volumes are checked before a training: none of them may be read as a whole."""
    files = make_subject_folder(tmp_path, n=1, suffix=".nii")["sub00"]
    with open(files["t1"], "r+b") as file:
        file.truncate(400)
    require_paired_grids([{"subject": "sub00", "target": str(files["t2"]), "reference": str(files["t1"])}])


# --- JSON datalists


def write_list(path, written, **sections):
    content = {
        name: [{"subject": s, **{c: os.path.relpath(p, path.parent) for c, p in written[s].items()}} for s in subjects]
        for name, subjects in sections.items()
    }
    path.write_text(json.dumps(content))
    return path


def test_a_json_keeps_its_own_split(tmp_path, make_subject_folder):
    written = make_subject_folder(tmp_path / "data", n=5, shape=SMALL)
    path = write_list(tmp_path / "my.json", written, training=["sub04", "sub00"], validation=["sub02"], test=["sub01"])
    datalist = prepare_datalist(path, tmp_path / "out", "t2", "t1", validation=0.9)
    assert names(datalist["training"]) == ["sub00", "sub04"]
    assert names(datalist["validation"]) == ["sub02"]  # who is tested on chooses no weights
    assert datalist["training"][0]["target"] == str(written["sub00"]["t2"])
    assert json.loads((tmp_path / "out" / "datalist.json").read_text())["validation"] == datalist["validation"]


def test_a_json_without_a_split_is_split(tmp_path, make_subject_folder):
    written = make_subject_folder(tmp_path / "data", n=5, shape=SMALL)
    path = write_list(tmp_path / "my.json", written, training=sorted(written))
    datalist = prepare_datalist(path, tmp_path / "out", "t2", "t1", seed=4)
    assert [names(datalist[s]) for s in ("training", "validation")] == [*split_subjects(list(written), seed=4)]


def test_a_json_without_names_is_split_by_patient(tmp_path, make_subject_folder):
    subjects = [f"patient{p:02d}_study{s}" for p in range(4) for s in (1, 2)]
    written = make_subject_folder(tmp_path / "data", names=subjects, shape=SMALL)
    items = [{c: str(p) for c, p in files.items()} for files in written.values()]
    (tmp_path / "my.json").write_text(json.dumps({"training": items}))
    for seed in range(4):
        datalist = prepare_datalist(tmp_path / "my.json", tmp_path / "out", "t2", "t1", validation=0.5, seed=seed)
        patients = [{name[:9] for name in names(datalist[s])} for s in ("training", "validation")]
        assert [len(p) for p in patients] == [2, 2] and not patients[0] & patients[1]


def test_a_json_without_training_can_be_inferred_but_not_trained(tmp_path, make_subject_folder):
    written = make_subject_folder(tmp_path / "data", n=2, shape=SMALL)
    path = write_list(tmp_path / "my.json", written, test=["sub00", "sub01"])
    assert names(inference_items(None, "t1", path, "t2")) == ["sub00", "sub01"]
    assert names(find_items(path, "t2", "t1")[0]["test"]) == ["sub00", "sub01"]
    with pytest.raises(ValueError, match=r'my\.json: has no section "training"'):
        prepare_datalist(path, tmp_path / "out", "t2", "t1")
    assert not (tmp_path / "out").exists()


# --- what the configs ask for


def test_what_is_evaluated_on(tmp_path, make_subject_folder):
    written = make_subject_folder(tmp_path / "data", n=5, shape=SMALL)
    path = write_list(tmp_path / "my.json", written, training=["sub04", "sub00"], validation=["sub02"], test=["sub01"])
    expected = {"training": ["sub00", "sub04"], "validation": ["sub02"], "test": ["sub01"]}
    for name, subjects in expected.items():
        assert names(evaluation_items(name, path, tmp_path / "out", "t2", "t1")) == subjects
    assert names(evaluation_items("all", path, tmp_path / "out", "t2", "t1")) == ["sub00", "sub04", "sub02", "sub01"]
    # of a folder: the split of its training, whatever is asked now; and all of it, even a single patient
    trained = prepare_datalist(tmp_path / "data", tmp_path / "out", "t2", "t1", validation=["sub03"])
    assert evaluation_items("validation", tmp_path / "data", tmp_path / "out", "t2", "t1") == trained["validation"]
    make_subject_folder(tmp_path / "single", n=1, shape=SMALL)
    assert names(evaluation_items("all", tmp_path / "single", tmp_path / "out", "t2", "t1")) == ["sub00"]
    for wrong in ("test", "everyone"):
        with pytest.raises(ValueError, match=f"evaluate_on='{wrong}': expected validation, training, test or all"):
            evaluation_items(wrong, tmp_path / "data", tmp_path / "out", "t2", "t1")


def test_a_patient_in_two_sections_is_refused(tmp_path, make_subject_folder):
    written = make_subject_folder(tmp_path / "data", names=["patient01_study1", "patient01_study2"], shape=SMALL)
    path = write_list(tmp_path / "my.json", written, training=["patient01_study1"], validation=["patient01_study2"])
    with pytest.raises(ValueError, match=r"my\.json: patient01 .* 'training' and in 'validation'"):
        prepare_datalist(path, tmp_path / "out", "t2", "t1")


def test_without_a_data_set_the_phantom_is_used_and_said_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(module, "demo_data", lambda: tmp_path / "phantom")
    assert dataset_or_demo(tmp_path) == str(tmp_path) and not caplog.records
    assert dataset_or_demo(None) == str(tmp_path / "phantom")
    (message,) = warnings_of(caplog)
    assert "SYNTHETIC" in message and str(tmp_path / "phantom") in message


def test_inference_on_a_pair_of_files(tmp_path, make_subject_folder):
    files = make_subject_folder(tmp_path, n=1, shape=SMALL)["sub00"]
    for form in (str, Path):
        items = inference_items(form(files["t2"]), form(files["t1"]), None, "t2")
        assert items == [{"subject": "t2", "image": str(files["t2"]), "reference": str(files["t1"])}]


def test_inference_on_a_data_set(tmp_path, make_subject_folder):
    written = make_subject_folder(tmp_path, n=2, layout="brats2021", contrasts=("t1", "t2", "flair"), shape=SMALL)
    assert inference_items(None, "t1", tmp_path, "flair") == [
        {"subject": s, "image": str(files["flair"]), "reference": str(files["t1"])} for s, files in written.items()
    ]


def test_a_low_resolution_data_set_is_no_pair_of_equal_grids(tmp_path, make_subject_folder):
    """At deployment the target is coarse: the grids are compared later, against the scale."""
    make_subject_folder(tmp_path, n=1, contrasts=("t1",), shape=(16, 18, 3))
    make_subject_folder(tmp_path, n=1, contrasts=("t2",), shape=(8, 9, 3))
    assert names(inference_items(None, "t1", tmp_path, "t2")) == ["sub00"]


@pytest.mark.parametrize(
    "image, reference, dataset_dir",
    [
        (None, None, None),
        (None, "t1", None),
        (None, None, "data"),
        ("lr.nii.gz", "t1.nii.gz", "data"),
        ("lr.nii.gz", None, "data"),
    ],
)
def test_inference_needs_one_way_of_naming(image, reference, dataset_dir):
    with pytest.raises(ValueError) as error:
        inference_items(image, reference, dataset_dir, "t2")
    assert "give either --image LR.nii.gz --reference REFERENCE.nii.gz, or --dataset_dir" in str(error.value)
    assert f"got image={image}, reference={reference}, dataset_dir={dataset_dir}" in str(error.value)


def test_inference_files_are_checked(tmp_path, make_subject_folder, make_volume):
    files = make_subject_folder(tmp_path / "data", n=1, shape=SMALL)["sub00"]
    stack = make_volume(tmp_path / "stack.nii.gz", np.ones((*SMALL, 4)))
    with pytest.raises(FileNotFoundError, match=r"missing\.nii\.gz: there is no such file"):
        inference_items(tmp_path / "missing.nii.gz", files["t1"], None, "t2")
    with pytest.raises(FileNotFoundError, match=r"missing\.nii\.gz: there is no such file"):
        inference_items(files["t2"], tmp_path / "missing.nii.gz", None, "t2")
    with pytest.raises(ValueError, match=r"stack\.nii\.gz: expected one 3-D volume"):
        inference_items(stack, files["t1"], None, "t2")
    with pytest.raises(ValueError, match=r"t2\.nii\.gz: found one volume and no reference, expected two; give the ref"):
        inference_items(files["t2"], None, None, "t2")
    with pytest.raises(ValueError, match=r"stack\.nii\.gz: found 4 volumes, the shape \(.*, 4\), expected two: the"):
        inference_items(stack, None, None, "t2")
    with pytest.raises(FileNotFoundError, match=r"subject sub00 has no target \(t9\); it has t1, t2"):
        inference_items(None, "t1", tmp_path / "data", "t9")


# --- all contrasts of a subject


def test_all_contrasts_of_the_subjects_that_are_trained_on(tmp_path, make_subject_folder):
    folder = tmp_path / "data"
    files = make_subject_folder(folder, n=3, contrasts=("flair", "pd", "t1", "t2", "seg"), shape=SMALL)
    make_subject_folder(folder, names=["few"], contrasts=("t1", "t2"), shape=SMALL)
    datalist = prepare_datalist(folder, tmp_path / "out", "t2", "t1", validation=["sub01"])
    found = contrast_items(datalist["training"], folder, "t2", "t1")
    assert [item["subject"] for item in found] == ["few", "sub00", "sub02"]
    assert [item["contrasts"] for item in found] == [["t2", "t1"], *[["t2", "t1", "flair", "pd"]] * 2]
    assert found[1]["files"] == [str(files["sub00"][name]) for name in ("t2", "t1", "flair", "pd")]
    assert [item["slice_axis"] for item in found] == [2, 2, 2]


def test_isotropic_subjects_are_trained_on_in_three_planes(tmp_path, make_subject_folder, make_affine):
    make_subject_folder(tmp_path / "data", n=2, shape=SMALL, affine=make_affine(spacing=(1, 1, 1)))
    items = prepare_datalist(tmp_path / "data", tmp_path / "out", "t2", "t1")["training"]
    found = contrast_items(items, tmp_path / "data", "t2", "t1")
    assert [item["slice_axis"] for item in found] == [0, 1, 2]
    (coronal,) = contrast_items(items, tmp_path / "data", "t2", "t1", slice_axis="coronal")
    assert coronal["slice_axis"] == 1


def test_a_contrast_on_another_grid_is_left_out(tmp_path, make_subject_folder, make_volume, caplog):
    files = make_subject_folder(tmp_path / "data", n=2, contrasts=("t1", "t2", "pd"), shape=SMALL)
    make_volume(files["sub00"]["pd"], np.ones((9, 9, 4)))
    items, _ = find_items(tmp_path / "data", "t2", "t1")
    with caplog.at_level(logging.WARNING):
        found = contrast_items(items["training"], tmp_path / "data", "t2", "t1")
    assert [item["contrasts"] for item in found] == [["t2", "t1"], ["t2", "t1", "pd"]]
    assert "pd.nii.gz" in caplog.text and "(9, 9, 4)" in caplog.text and "left out" in caplog.text


def test_contrasts_of_a_json_datalist(tmp_path, make_subject_folder):
    files = make_subject_folder(tmp_path / "data", n=2, contrasts=("t1", "t2", "flair"), shape=SMALL)
    sections = {
        name: [{"subject": subject, **{c: str(p) for c, p in files[subject].items()}}]
        for name, subject in (("training", "sub00"), ("validation", "sub01"))
    }
    path = tmp_path / "list.json"
    path.write_text(json.dumps(sections))
    items = prepare_datalist(path, tmp_path / "out", "t2", "t1")["training"]
    (found,) = contrast_items(items, path, "t2", "t1")
    assert found["subject"] == "sub00" and found["contrasts"] == ["t2", "t1", "flair"]
    assert found["files"] == [str(files["sub00"][name]) for name in ("t2", "t1", "flair")]


def test_items_at_factors():
    assert at_factors([{"subject": "a", "target": "x"}], [2, 2.5]) == [
        {"subject": "a at 2x", "target": "x", "scale": 2},
        {"subject": "a at 2.5x", "target": "x", "scale": 2.5},
    ]
