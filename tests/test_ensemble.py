"""The self-ensemble against kernels turned by numpy, its SD and the SD's metrics against numpy and scipy."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow
from monai.inferers import SliceInferer
from scipy import ndimage, stats
from torch import nn

from glmamba_monai import simulate, super_resolve
from glmamba_monai.engines import EnsembleMeand, SelfEnsembleInferer, SubjectMetrics
from glmamba_monai.engines.ensemble import mean_and_sd
from glmamba_monai.engines.evaluation import format_sd_table, summarise, write_results
from glmamba_monai.formats import sd_path
from glmamba_monai.metrics import SD_METRICS, sd_metrics
from glmamba_monai.networks import build_network
from glmamba_monai.transforms import KSpaceDataConsistency, KSpaceLowResolution, KSpaceUpsample

CONFIGS = Path(__file__).parent.parent / "bundle" / "configs"
SLICES = {"roi_size": [-1, -1], "spatial_dim": 2}
# Seven numbers of which no turn or mirror image of the kernel is the kernel itself.
KERNEL = np.array([[0.1, 0.0, 0.3], [0.2, 1.0, -0.4], [0.0, -0.2, 0.15]])


def eight(image):
    """An array ``(X, Y)`` in its eight orientations, by numpy."""
    return [np.rot90(mirrored, turns) for mirrored in (image, image[::-1]) for turns in range(4)]


class Filter(nn.Module):
    """A convolution of channel 0 with zeros around the slice, which the ensemble may compare with scipy's."""

    def __init__(self, kernel):
        super().__init__()
        self.kernel = torch.from_numpy(kernel)[None, None]

    def forward(self, x):
        y = nn.functional.conv2d(x[:, :1], self.kernel.to(x), padding=1)
        return torch.cat((y, x[:, 1:]), dim=1)


# --- the inferer


@pytest.mark.parametrize("shape", [(9, 14), (12, 12), (16, 11)])
def test_the_ensemble_of_a_filter_is_that_of_its_turned_kernels(shape):
    x = torch.rand(1, 2, *shape, 3, dtype=torch.float64)
    infer = SelfEnsembleInferer(self_ensemble=True, sw_batch_size=2, **SLICES)
    found = infer(x, Filter(KERNEL))
    assert found.shape == (1, 8, *shape, 3)
    image = x[0, 0].numpy()
    expected = np.stack([ndimage.correlate(image, k[..., None], mode="constant") for k in eight(KERNEL)])
    assert all(np.ptp(expected[:, 3, 4, 1][[i, j]]) > 1e-6 for i in range(8) for j in range(i))  # all differ
    np.testing.assert_allclose(np.sort(found[0], axis=0), np.sort(expected, axis=0), atol=1e-12)
    np.testing.assert_allclose(found[0, 0], expected[0], atol=1e-12)  # first: the slices as they are
    for value, by_numpy in zip(mean_and_sd(found[0]), (expected.mean(0), expected.std(0, ddof=1))):
        assert value.shape == (1, *shape, 3)
        np.testing.assert_allclose(value[0], by_numpy, atol=1e-12)


def test_an_equivariant_network_has_no_spread():
    """An even kernel, and no filter at all: not a pixel is moved, in float32 as in the configs."""
    x = torch.rand(1, 2, 10, 13, 4)
    infer = SelfEnsembleInferer(self_ensemble=True, sw_batch_size=3, **SLICES)
    even = np.array([[0.1, 0.3, 0.1], [0.3, -1.0, 0.3], [0.1, 0.3, 0.1]])
    mean, sd = mean_and_sd(infer(x, Filter(even))[0])
    np.testing.assert_allclose(mean[0], SliceInferer(sw_batch_size=3, **SLICES)(x, Filter(even))[0, 0], atol=1e-6)
    assert sd.max() < 1e-6
    mean, sd = mean_and_sd(infer(x, nn.Identity())[0])
    assert torch.equal(mean, x[0, :1]) and torch.count_nonzero(sd) == 0  # to the last bit


@pytest.mark.parametrize("self_ensemble", [True, False])
def test_the_first_orientation_is_what_the_network_gives(self_ensemble):
    torch.manual_seed(0)
    network = build_network("glmamba_light").eval()
    nn.init.normal_(network.lr_head[-1].weight, std=0.1)  # it starts at zero, as zero-filling
    x = torch.rand(1, 2, 14, 11, 2)
    with torch.no_grad():
        found = SelfEnsembleInferer(self_ensemble=self_ensemble, sw_batch_size=2, **SLICES)(x, network)
        expected = SliceInferer(sw_batch_size=2, **SLICES)(x, network)
    if not self_ensemble:
        assert torch.equal(found, expected)
        return
    assert torch.equal(found[:, :1], expected[:, :1])
    assert found.std(dim=1).max() > 1e-4  # of a network that reads slices in an order


def test_the_bar_counts_slices_as_it_does_without(capsys):
    for self_ensemble in (False, True):
        infer = SelfEnsembleInferer(self_ensemble=self_ensemble, sw_batch_size=2, progress=True, **SLICES)
        infer(torch.rand(1, 2, 8, 9, 5), nn.Identity())
        assert "3/3" in capsys.readouterr().err  # batches of two slices


@pytest.mark.parametrize("scale", [2, 3, 1.5, [2, 3]], ids=str)
@pytest.mark.parametrize("shape", [(16, 22), (15, 18), (21, 13)])
def test_an_orientation_is_upsampled_as_its_slice_is(shape, scale):
    """Low resolution and zero-filling keep to the pixels' centres: turned before or after, the input is the same.

    So nothing is shifted against the reference. The one frequency that an even matrix keeps without its twin is left
    out along an axis: which of the two is kept does depend on the orientation.
    """
    spectrum = torch.fft.fft(torch.rand(1, *shape, dtype=torch.float64), dim=1)
    n = KSpaceLowResolution(scale)(torch.zeros(1, *shape)).shape[1]
    if n % 2 == 0:
        spectrum[:, [n // 2, -n // 2]] = 0
    image = torch.fft.ifft(spectrum, dim=1).real
    for i, turned in enumerate(eight(image[0].numpy())):
        factor = scale[::-1] if isinstance(scale, list) and i % 2 else scale
        inputs = []
        for x, s in ((image, scale), (torch.from_numpy(turned.copy())[None], factor)):
            inputs.append(KSpaceUpsample()(KSpaceLowResolution(s)(x), x.shape[1:])[0].numpy())
        np.testing.assert_allclose(inputs[1], eight(inputs[0])[i], atol=1e-12)


# --- volumes


def make_pair(tmp_path, make_subject_folder):
    files = make_subject_folder(tmp_path / "data", n=1)["sub00"]  # 24 x 28, oblique
    simulate(files["t2"], tmp_path / "lr.nii.gz", 2)
    return {"lr": tmp_path / "lr.nii.gz", **files}


def write_weights(path, seed=0):
    network = build_network("srcnn_ref")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    torch.save(network.state_dict(), path)
    return network.eval()


def members(network, x):
    """The super-resolved ``(8, X, Y, S)`` of ``(2, X, Y, S)``, turned by numpy; the order is another."""
    found = []
    for mirror in (False, True):
        for turns in range(4):
            y = np.rot90(x[:, ::-1] if mirror else x, turns, axes=(1, 2))
            with torch.no_grad():
                y = network(torch.from_numpy(y.copy()).permute(3, 0, 1, 2))[:, 0].permute(1, 2, 0).numpy()
            y = np.rot90(y, -turns, axes=(0, 1))
            found.append(y[::-1] if mirror else y)
    return np.stack(found)


def test_super_resolve_writes_mean_and_sd(tmp_path, make_subject_folder):
    files = make_pair(tmp_path, make_subject_folder)
    network = write_weights(tmp_path / "w.pt")
    options = {"network": "srcnn_ref", "weights": tmp_path / "w.pt", "device": "cpu", "self_ensemble": True}
    result, sd = super_resolve(files["lr"], files["t1"], tmp_path / "out" / "sr.nii.gz", **options)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["sr.nii.gz", "sr_sd.nii.gz"]
    reference = nib.load(files["t1"])
    for volume, name in ((result, "sr"), (sd, "sr_sd")):
        written = nib.load(tmp_path / "out" / f"{name}.nii.gz")
        assert written.get_data_dtype() == np.float32 and written.shape == reference.shape
        np.testing.assert_allclose(written.affine, reference.affine, atol=1e-4)
        np.testing.assert_array_equal(written.get_fdata(dtype=np.float32), volume[0].numpy())

    lr, t1 = (nib.load(files[k]).get_fdata(dtype=np.float32) for k in ("lr", "t1"))
    up = super_resolve(files["lr"], files["t1"], network="zero_filling")[0].numpy()
    divisor = np.percentile(lr, 99.9)
    expected = divisor * members(network, np.stack([up / divisor, t1 / np.percentile(t1, 99.9)]).astype(np.float32))
    np.testing.assert_allclose(result[0], expected.mean(0), rtol=1e-4, atol=1e-2)
    np.testing.assert_allclose(sd[0], expected.std(0, ddof=1), rtol=1e-3, atol=1e-2)
    assert sd.median() > 1  # in the units of the low resolution

    consistent, sd = super_resolve(files["lr"], files["t1"], data_consistency=True, **options)
    measured = torch.from_numpy(lr)[None]
    again = KSpaceLowResolution(2)(consistent.as_tensor())
    assert (again - measured).abs().max() <= 1e-5 * measured.max()
    each = [KSpaceDataConsistency()(torch.from_numpy(e.copy())[None], measured)[0].numpy() for e in expected]
    np.testing.assert_allclose(sd[0], np.std(each, axis=0, ddof=1), rtol=1e-3, atol=2e-2)


def test_interpolation_has_no_spread(tmp_path, make_subject_folder):
    files = make_pair(tmp_path, make_subject_folder)
    plain = super_resolve(files["lr"], files["t1"], network="zero_filling")
    mean, sd = super_resolve(files["lr"], files["t1"], tmp_path / "sr.mha", network="zero_filling", self_ensemble=True)
    assert torch.equal(mean.as_tensor(), plain.as_tensor()) and torch.count_nonzero(sd) == 0
    assert (tmp_path / "sr_sd.mha").is_file()


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("a/sr.nii.gz", "a/sr_sd.nii.gz"),
        ("sr.v2.nii", "sr.v2_sd.nii"),
        ("sr.nrrd", "sr_sd.nrrd"),
        ("sr.mha", "sr_sd.mha"),
        ("a/dicom", "a/dicom_sd.nii.gz"),  # beside the folder of a series, which holds images alone
    ],
)
def test_where_the_sd_goes(output, expected):
    assert sd_path(output) == Path(expected)


def test_a_data_set_gives_two_files_a_subject(tmp_path, make_subject_folder):
    files = make_pair(tmp_path, make_subject_folder)
    low = tmp_path / "low" / "sub00"
    low.mkdir(parents=True)
    (low / "t2.nii.gz").write_bytes(files["lr"].read_bytes())
    (low / "t1.nii.gz").write_bytes(files["t1"].read_bytes())
    workflow = ConfigWorkflow(
        config_file=str(CONFIGS / "inference.json"),
        workflow_type="infer",
        logging_file=False,
        dataset_dir=str(tmp_path / "low"),
        reference="t1",
        network="srcnn_ref",
        weights=str(tmp_path / "w.pt"),
        self_ensemble=True,
        output_dir=str(tmp_path / "out"),
    )
    write_weights(tmp_path / "w.pt")
    workflow.initialize()
    workflow.run()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["sub00_sr.nii.gz", "sub00_sr_sd.nii.gz"]
    result, sd = super_resolve(
        files["lr"], files["t1"], network="srcnn_ref", weights=tmp_path / "w.pt", self_ensemble=True
    )
    for volume, name in ((result, "sr"), (sd, "sr_sd")):
        np.testing.assert_array_equal(nib.load(tmp_path / "out" / f"sub00_{name}.nii.gz").get_fdata(), volume[0])


def test_the_mean_and_the_sd_are_made_in_place():
    volumes = torch.rand(8, 6, 7, 2)
    data = {"pred": volumes, "other": 1}
    found = EnsembleMeand("pred", "sd", "low_resolution")(data)
    assert data["pred"] is volumes and found["other"] == 1
    np.testing.assert_allclose(found["pred"][0], volumes.numpy().mean(0), rtol=1e-5)
    np.testing.assert_allclose(found["sd"][0], volumes.numpy().std(0, ddof=1), rtol=1e-4)


# --- what the SD is worth


@pytest.mark.parametrize("ties", [False, True])
def test_metrics_of_the_sd_equal_scipy(ties):
    rng = np.random.default_rng(0)
    sd = rng.gamma(2.0, 1.0, 5003).astype(np.float32)
    error = (sd * np.abs(rng.normal(size=sd.size))).astype(np.float32)
    if ties:
        sd, error = np.round(2 * sd) + np.linspace(0, 1e-3, sd.size, dtype=np.float32).round(3), np.round(error)
    found = sd_metrics(*(torch.from_numpy(values) for values in (sd, error, sd**2 - 2 * sd)))
    assert list(found) == list(SD_METRICS)
    assert found["sd_spearman"] == pytest.approx(stats.spearmanr(sd, error).statistic, abs=1e-9)
    assert found["edges_spearman"] == pytest.approx(stats.spearmanr(sd**2 - 2 * sd, error).statistic, abs=1e-9)
    assert found["sd_pearson"] == pytest.approx(stats.pearsonr(sd.astype(float), error.astype(float))[0], abs=1e-9)
    assert found["sd_top_error_limit"] == pytest.approx(np.sort(error)[-500:].mean() / error.mean(), rel=1e-6)
    assert found["sd_within_2"] == pytest.approx(np.mean(error <= 2 * sd), abs=1e-9)
    if not ties:
        assert found["sd_within_2"] == pytest.approx(stats.norm.cdf(2) - stats.norm.cdf(-2), abs=0.01)
        largest = error[np.argsort(sd)[-500:]]
        assert found["sd_top_error"] == pytest.approx(largest.mean() / error.mean(), rel=1e-6)
        assert 1.5 < found["sd_top_error"] < found["sd_top_error_limit"]


@pytest.mark.parametrize("sd", [torch.zeros(50), torch.zeros(0), torch.ones(1)], ids=["equal", "none", "one"])
def test_metrics_of_an_sd_without_spread_do_not_exist(sd):
    assert all(np.isnan(value) for value in sd_metrics(sd, *torch.rand(2, len(sd))).values())


def test_an_evaluation_with_the_ensemble(tmp_path, make_subject_folder, capsys):
    make_subject_folder(tmp_path / "data", n=2)
    network = write_weights(tmp_path / "w.pt")
    made = ConfigWorkflow(
        config_file=[str(CONFIGS / "train.json"), str(CONFIGS / "evaluate.json")],
        workflow_type="train",
        logging_file=False,
        dataset_dir=str(tmp_path / "data"),
        output_dir=str(tmp_path / "out"),
        network="srcnn_ref",
        weights=str(tmp_path / "w.pt"),
        device="$torch.device('cpu')",
        evaluate_on="all",
        self_ensemble=True,
    )
    made.initialize()
    made.run()
    (item,) = made.parser.get_parsed_content("validate#evaluator").state.batch  # the last subject
    with (tmp_path / "out" / "metrics.csv").open(newline="") as file:
        rows = {row["method"]: row for row in csv.DictReader(file) if row["subject"] == "sub01"}
    methods = ["zero_filling", "bicubic", "srcnn_ref", "srcnn_ref + ensemble"]
    assert list(rows) == methods + [f"{method} + dc" for method in methods]

    target = np.asarray(item["target"][0])
    each = members(network, np.asarray(item["image"]))
    consistent = [KSpaceDataConsistency()(torch.from_numpy(e.copy())[None], item["low_resolution"])[0] for e in each]
    mask = target > float(item["foreground_level"])
    for variant, volumes in (("", each), (" + dc", np.stack([np.asarray(c) for c in consistent]))):
        row = rows[f"srcnn_ref + ensemble{variant}"]
        mean = each.mean(0)
        if variant:
            mean = KSpaceDataConsistency()(torch.from_numpy(mean.copy())[None], item["low_resolution"])[0].numpy()
        squared = np.square((np.abs(mean) - target) / float(item["data_range"])).mean(axis=(0, 1))
        assert float(row["psnr"]) == pytest.approx(np.mean(-10 * np.log10(squared)), abs=2e-3)
        sd, error = volumes.std(0, ddof=1)[mask], np.abs(np.abs(mean) - target)[mask]
        assert float(row["sd_spearman"]) == pytest.approx(stats.spearmanr(sd, error).statistic, abs=1e-3)
        assert float(row["sd_pearson"]) == pytest.approx(np.corrcoef(sd, error)[0, 1], abs=1e-3)
        edges = np.hypot(*np.gradient(mean, axis=(0, 1)))[mask]
        assert float(row["edges_spearman"]) == pytest.approx(stats.spearmanr(edges, error).statistic, abs=1e-3)
        assert rows[f"srcnn_ref{variant}"]["psnr"] != row["psnr"]
        assert all(rows[f"{method}{variant}"]["sd_spearman"] == "" for method in methods[:3])

    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["methods"]["srcnn_ref + ensemble"]["sd_pearson"]["subjects"] == 2
    assert "sd_pearson" not in summary["methods"]["srcnn_ref"] and "sd_pearson" in summary["conventions"]
    printed = capsys.readouterr().out
    assert "| srcnn_ref + ensemble + dc |" in printed and "SD of the self-ensemble" in printed


def test_rows_and_tables_of_an_sd(tmp_path):
    """Names that MLflow takes, and figures of one subject as they are."""
    metric = SubjectMetrics("net")
    target = torch.rand(1, 16, 15, 3) + 0.5
    item = {"subject": "s", "target": target, "data_range": 1.5, "foreground_level": 0.6}
    item |= {"zero_filling": target + 0.1, "bicubic": target - 0.1}
    ensemble = target + 0.1 * torch.rand(8, 16, 15, 3)
    metric.update((item, {"pred": ensemble[:1], "ensemble": ensemble}))
    row = metric.rows[-1]
    assert row["method"] == "net + ensemble" and -1 < row["sd_spearman"] < 1
    lines = format_sd_table(metric.rows).splitlines()
    assert len(lines) == 5 and lines[-1].startswith(f"| net + ensemble | {row['sd_spearman']:.2f} | ")
    assert len({line.count("|") for line in lines[2:]}) == 1
    write_results(metric.rows, tmp_path, {})
    assert summarise(metric.rows).keys() == json.loads((tmp_path / "summary.json").read_text())["methods"].keys()

    from ignite.engine import Engine

    engine = Engine(lambda engine, _: None)
    engine.state.metrics = {}
    metric.completed(engine, "val_psnr")
    assert engine.state.metrics["val_ensemble_psnr"] == pytest.approx(row["psnr"])
