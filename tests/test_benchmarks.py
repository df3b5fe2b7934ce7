"""The benchmarks run at tiny sizes and compute what they say; what they measure is not tested."""

import importlib
import os
from pathlib import Path

import nibabel as nib
import pytest
import torch
from torch import nn

from glmamba_monai.networks.cost import count_cost
from glmamba_monai.ops.backends import OPERATIONS
from glmamba_monai.ops.selective_scan import selective_scan

FOLDER = Path(__file__).parent.parent / "benchmarks"
NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
DEVICES = ["cpu", pytest.param("cuda", marks=NO_CUDA)]


@pytest.fixture(autouse=True)
def _restored(monkeypatch):
    """The folder can be imported from, and torch's settings are as they were afterwards."""
    monkeypatch.syspath_prepend(str(FOLDER))
    threads, tf32 = torch.get_num_threads(), (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
    yield
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32


def tables(text):
    """The Markdown tables of an output: lists of rows of cells, the head first."""
    found = []
    lines = text.splitlines()
    for before, line in zip(["", *lines], lines):
        if line.startswith("| "):
            if not before.startswith("| "):
                found.append([])
            found[-1].append([cell.strip() for cell in line.strip("|").split(" | ")])
    for table in found:
        assert all(len(row) == len(table[0]) for row in table)
    return [[table[0], *table[2:]] for table in found]


@pytest.mark.parametrize("device", DEVICES)
def test_sanitize(device, capsys, monkeypatch):
    sanitize = importlib.import_module("sanitize")
    monkeypatch.setattr(sanitize, "SLICES", ((8, 3, 1, 8, 12),))
    monkeypatch.setattr(sanitize, "SCANS", ((8, 1, 6, 10, True),))
    monkeypatch.setattr(sanitize, "CONVOLUTIONS", ((4, 3, 5, 7),))
    sanitize.main(device)
    lines = [line.partition(" ")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("run_")]
    assert lines == ["run_network"] * 2 + ["run_scan"] * 2 + ["run_convolution"] * 2


@pytest.mark.parametrize("device", DEVICES)
def test_operators(device, capsys):
    importlib.import_module("operators").main(device, side=16, channels=8, batch=(2, 1), seconds=0, threads=2)
    text = capsys.readouterr().out
    scan, deform = tables(text)
    ours = scan[0][2].removesuffix(" (ms)")
    assert ours in [b.name for b in OPERATIONS["ss2d_scan"].backends]
    assert "copy" in text and "ss2d_scan: cpu -> " in text
    assert [row[0] for row in scan[1::2]][:3] == [f"B{b} K4 D16 N16 8x8 fp32" for b in (2, 1)] + [
        "B2 K4 D16 N16 8x8 quadrants fp32"
    ]
    assert {row[1] for row in scan[1:]} == {"forward", "backward" if device == "cuda" else "forward + backward"}
    assert any(head.startswith("conv2d (ms") for head in deform[0])
    # mamba-ssm and torchvision have a column where they are installed, and none elsewhere.
    assert any("mamba_ssm" in head for head in scan[0]) == ("mamba_ssm" in available("ss2d_scan", device))
    assert any("torchvision" in head for head in deform[0]) == ("torchvision" in available("deform_conv2d", device))
    for row in scan[1:] + deform[1:]:
        bound = 5e-2 if "bf16" in row[0] else 5e-3  # tf32 is allowed on a GPU
        assert row[-1] == "-" or float(row[-1]) < bound


def available(op, device):
    return importlib.import_module("timing").available_backends(op, device)


def test_unbind_loop_is_the_scan():
    g = torch.Generator().manual_seed(0)
    u, delta = torch.randn(2, 8, 9, generator=g), torch.randn(2, 8, 9, generator=g)
    B, C = torch.randn(2, 4, 3, 9, generator=g), torch.randn(2, 4, 3, 9, generator=g)
    A, D, bias = -torch.rand(8, 3, generator=g), torch.randn(8, generator=g), torch.randn(8, generator=g)
    y = importlib.import_module("operators").unbind_scan(u, delta, A, B, C, D, bias)
    torch.testing.assert_close(y, selective_scan(u, delta, A, B, C, D, bias, True, "torch"))


def test_passes_of_a_known_operation():
    operators = importlib.import_module("operators")
    x, w = torch.randn(2, 3, 4, 4), torch.randn(5, 3, 1, 1)
    candidate = operators.Candidate(nn.functional.conv2d, [x, w])
    for device, second in (("cpu", "forward + backward"), ("cuda", "backward")):
        calls = {name: call["conv"] for name, call in operators.passes({"conv": candidate}, device)}
        assert list(calls) == ["forward", second]
        torch.testing.assert_close(calls["forward"](), nn.functional.conv2d(x, w))
        *_, dx, dw = calls[second]()
        assert dx.shape == x.shape and dw.shape == w.shape
        dy = operators.output_gradient(torch.empty(2, 5, 4, 4))
        torch.testing.assert_close(dx, torch.einsum("bohw,oi->bihw", dy, w[:, :, 0, 0]))

    # Bytes: 96 and 15 values read, 160 written; backwards the same and the gradients. Exponentials: 2 + N a step.
    case = operators.Case(batch=2, channels=3, side=4, states=6)
    values = {
        name: operators.floors(case, candidate, name, bandwidth=4.0, rate=1.0)
        for name in ("forward", "backward", "forward + backward")
    }
    steps = 2 * 16 * 4 * 3 * 8
    assert values == {
        "forward": [271, steps],
        "backward": [382, steps],
        "forward + backward": [653, 2 * steps],
    }


@pytest.mark.parametrize("device", DEVICES)
def test_network_speed(device, capsys):
    before = [os.environ.get(operation.variable) for operation in OPERATIONS.values()]
    speed = importlib.import_module("network_speed")
    speed.main("srcnn_ref,srcnn", batch=(1, 2), size=16, seconds=0, threads=2, device=device)
    text = capsys.readouterr().out
    assert [os.environ.get(operation.variable) for operation in OPERATIONS.values()] == before
    table, *memory = tables(text)
    titles = [row[0] for row in table[1:] if row[1] == "forward" and "fp32" in row[0]]
    assert titles == [f"{n}, batch {b}, fp32" for b in (1, 2) for n in ("srcnn_ref", "srcnn")]
    assert [row[0] for row in table[1:]][::2] == [row[0] for row in table[1:] if row[1] == "training step"]
    reference = importlib.import_module("timing").reference_backends(device)[0]
    assert len(table[0]) == (5 if reference else 4)
    assert bool(reference) != ("Left out" in text)
    assert len(memory) == (device == "cuda")


def test_multiply_adds_of_the_plain_convolutions():
    speed = importlib.import_module("network_speed")

    class Slices(nn.Module):  # what count_cost feeds has two channels
        def __init__(self):
            super().__init__()
            self.stack = speed.plain_convolutions(1, 8, False, True, "cpu").network

        def forward(self, x):
            return self.stack(x[:, :1].expand(-1, speed.CHANNELS, -1, -1))

    assert count_cost(Slices(), 8, 8).macs == speed.plain_macs(8)


def test_forced_backends_run(monkeypatch):
    """The column of another backend runs that backend."""
    timing = importlib.import_module("timing")
    for op, operation in OPERATIONS.items():
        monkeypatch.setenv(operation.variable, f"not a backend of {op}")
    name, modules = timing.reference_backends("cpu")
    assert name and set(modules) == set(OPERATIONS)
    training = importlib.import_module("network_speed").network_training("glmamba_light", 1, 16, False, "cpu")
    timing.forced(modules)(training.step)()
    with pytest.raises(ValueError, match="not a backend"):
        training.step()


def test_reference_that_is_not_there(monkeypatch):
    timing = importlib.import_module("timing")
    for missing in ("mamba_ssm", "torchvision"):
        there = {"mamba_ssm", "torchvision", "torch"} - {missing}
        monkeypatch.setattr(timing, "available_backends", lambda op, device, there=there: there)
        assert timing.reference_backends("cuda")[0] == ""


@pytest.mark.parametrize("device", DEVICES)
def test_scaling(device, capsys):
    scaling = importlib.import_module("scaling")
    scaling.main("srcnn", sizes=(16, 32), batches=(1, 2), seconds=0, threads=2, device=device)
    sizes, batches = tables(capsys.readouterr().out)
    assert [row[0] for row in sizes[1:]] == ["batch 1, 16x16", "batch 1, 32x32"]
    assert [row[0] for row in batches[1:]] == ["batch 1, 16x16", "batch 2, 16x16"]
    assert sizes[1][2] == sizes[1][4] == batches[1][2] == "1.00"


def test_scaling_is_relative_to_the_pixels(monkeypatch, capsys):
    scaling = importlib.import_module("scaling")
    monkeypatch.setattr(
        scaling, "slice_seconds", lambda s, n, batch, size, b: None if size > 200 else (size**2 * 1e-6, size**3 * 1e-8)
    )
    scaling.print_growth(None, "srcnn", [(1, 50), (1, 100), (1, 400)], (1, 100), False)
    (table,) = tables(capsys.readouterr().out)
    assert table[1:] == [
        ["batch 1, 100x100", "10", "1.00", "10", "1.00"],
        ["batch 1, 50x50", "2.5", "1.00", "1.25", "0.50"],
        ["batch 1, 400x400", *["out of memory"] * 4],
    ]


def test_known_moves_are_found_again(tmp_path, capsys, monkeypatch):
    from glmamba_monai.data.phantom import make_subject

    for name, image in make_subject(3, spacing=4.0).items():
        if name in ("t1", "t2"):
            (tmp_path / "sub").mkdir(exist_ok=True)
            nib.save(image, tmp_path / "sub" / f"{name}.nii.gz")
    benchmark = importlib.import_module("registration")
    monkeypatch.setattr(benchmark, "MOVES", ((3, 2),))
    benchmark.main(str(tmp_path))
    (table,) = tables(capsys.readouterr().out)
    assert [row[1] for row in table[1:]] == ["t1", "t2, 2x lower"]
    for row in table[1:]:
        assert float(row[2]) < 1 and row[6] == "1 of 1"
