"""The figures of docs/results.md on a tiny subject: which way up, what is zoomed, whose pictures are refused."""

from __future__ import annotations

import importlib.util
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest
import torch

from glmamba_monai.networks import build_network

pytest.importorskip("matplotlib")
SCRIPT = Path(__file__).parent.parent / "docs" / "make_results.py"


@pytest.fixture(scope="module")
def results():
    spec = importlib.util.spec_from_file_location("make_results", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("plane", "shown"),
    [("LP", "RA"), ("LS", "RS"), ("PS", "AS")],  # a row runs towards the first; the top left corner is the second
    ids=["axial", "coronal", "sagittal"],
)
def test_every_slice_is_shown_the_same_way_up(results, plane, shown):
    opposite = dict(zip("LRAPIS", "RLPASI"))
    top_left = set(shown)
    for codes in {
        tuple(opposite[c] if flip else c for c, flip in zip(order, flips))
        for order in permutations(plane)
        for flips in product((False, True), repeat=2)
    }:
        image = torch.zeros(5, 5)
        corner = [4 if code in top_left else 0 for code in codes]  # where codes[i] grows towards the corner
        image[tuple(corner)] = 2
        beside = list(corner)
        across = next(i for i, code in enumerate(codes) if code in (plane[0], opposite[plane[0]]))
        beside[across] += 1 if corner[across] == 0 else -1
        image[tuple(beside)] = 1
        found = results.upright(image, codes)
        assert found[0, 0] == 2 and found[0, 1] == 1, codes


def test_what_is_zoomed(results):
    error, mask = np.zeros((30, 40)), np.zeros((30, 40), dtype=bool)
    mask[5:25, 6:30] = True
    error[10:13, 20:23] = 0.1
    error[4, 12] = error[0, 0] = 5  # outside the head
    rows, columns = results.inset_window(error, mask, 8)
    assert rows.stop - rows.start == columns.stop - columns.start == 8
    assert rows.start <= 10 and rows.stop >= 13 and columns.start <= 20 and columns.stop >= 23
    assert mask[rows, columns].all()
    assert results.head_window(mask) == (slice(1, 29), slice(2, 34))


def test_figures_of_a_subject(results, tmp_path, make_subject_folder, capsys, monkeypatch):
    make_subject_folder(tmp_path / "openms_mni", names=["patient07"], shape=(40, 48, 5))
    torch.manual_seed(0)
    network = build_network("srcnn_ref")
    torch.nn.init.normal_(network.reconstruction.weight, std=0.01)
    torch.save(network.state_dict(), tmp_path / "model.pt")
    weights = {"srcnn_ref": str(tmp_path / "model.pt")}
    results.main(str(tmp_path / "openms_mni" / "patient07"), weights, scales=(2, 3), output_dir=str(tmp_path / "out"))
    names = [tmp_path / "out" / f"patient07_{scale}x.png" for scale in (2, 3)]
    assert capsys.readouterr().out.split() == [str(name) for name in names]
    assert sorted((tmp_path / "out").iterdir()) == names
    pictures = [results.plt.imread(name) for name in names]
    assert pictures[0].shape == pictures[1].shape and min(pictures[0].shape[:2]) > 300
    assert not np.array_equal(*pictures)

    found = results.load_slice(tmp_path / "openms_mni" / "patient07", "t2", "t1", 2, 1)
    slices = results.super_resolve(weights, found, 2)
    assert list(slices) == ["zero_filling", "srcnn_ref"] and torch.equal(slices["zero_filling"], found.upsampled)
    with torch.no_grad():
        expected = network.eval()(torch.stack((found.upsampled, found.reference))[None])[0, 0]
    torch.testing.assert_close(slices["srcnn_ref"], expected)

    # No file named: the bundle's for that factor.
    monkeypatch.setattr(results, "BUNDLE", tmp_path / "bundle")
    (tmp_path / "bundle" / "models").mkdir(parents=True)
    (tmp_path / "model.pt").rename(tmp_path / "bundle" / "models" / "model_2x.pt")
    torch.testing.assert_close(results.super_resolve({"srcnn_ref": None}, found, 2)["srcnn_ref"], expected)
    with pytest.raises(FileNotFoundError, match="no weights for the factor 3"):
        results.super_resolve({"srcnn_ref": None}, found, 3)


def test_pictures_of_other_data_are_refused(results, tmp_path, make_subject_folder, monkeypatch):
    monkeypatch.setattr(results, "demo_data", lambda: str(tmp_path / "phantom"))
    make_subject_folder(tmp_path / "brats", names=["TCGA-00"])
    with pytest.raises(ValueError, match=r"TCGA-00: expected a subject of openms_long .* no picture may be published"):
        results.main(str(tmp_path / "brats" / "TCGA-00"), output_dir=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    results.require_publishable(tmp_path / "phantom" / "subject-005")
