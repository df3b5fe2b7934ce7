"""Networks as TorchScript and ONNX: at sizes they were not exported at, they do what the network does."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.bundle import ckpt_export, onnx_export

import glmamba_monai
from glmamba_monai.__main__ import main
from glmamba_monai.networks import build_network

CONFIGS = Path(__file__).resolve().parent.parent / "bundle" / "configs"
# Odd, rectangular, the smallest, larger than at export; in an order that goes back to a size seen before.
SHAPES = [(1, 2, 48, 56), (3, 2, 9, 22), (1, 2, 8, 8), (1, 2, 33, 70), (1, 2, 64, 64), (3, 2, 9, 22)]
SMALL = {"channels": 8, "n_mamba": 1, "n_deform": 1, "d_state": 3, "attention_reduction": 2, "mix_channels": 4}


def trained_like(name, **arguments):
    """A network whose offsets, masks and output layer are not zero, as they are at the start of a training."""
    torch.manual_seed(0)
    network = build_network(name, **arguments).eval()
    for key, parameter in network.named_parameters():
        if "offsets_and_mask" in key or key.startswith(("lr_head.2", "reconstruction")):
            torch.nn.init.normal_(parameter, std=0.05)
    return network


def inputs():
    torch.manual_seed(1)
    return [torch.rand(shape) for shape in SHAPES]


def eager(network, x):
    with torch.no_grad():
        y = network(x)
    assert (y[:, 0] - x[:, 0]).abs().max() > 0.01  # the network does something
    return y


def exported(export, built, folder, filename, **options):
    torch.save(built.state_dict(), folder / "model.pt")
    export(
        net_id="network_def",
        filepath=str(folder / filename),
        ckpt_file=str(folder / "model.pt"),
        meta_file=str(CONFIGS / "metadata.json"),
        config_file=str(CONFIGS / "inference.json"),
        **options,
    )
    return folder / filename


# --- TorchScript ---


@pytest.mark.parametrize("name", ["glmamba", "glmamba_light", "table1_lr_local", "table1_ref_global", "srcnn_ref"])
def test_torchscript_of_any_size_equals_eager(name, tmp_path):
    network = trained_like(name)
    scripted = torch.jit.load(str(exported(ckpt_export, network, tmp_path, "model.ts", network=name)))
    for x in inputs():
        with torch.no_grad():
            y = scripted(x)
        torch.testing.assert_close(y, eager(network, x), rtol=1e-5, atol=1e-5)


def test_torchscript_loads_without_the_package(tmp_path):
    network = trained_like("glmamba_light")
    path = exported(ckpt_export, network, tmp_path, "model.ts", network="glmamba_light")
    x = inputs()[3]
    torch.save(x, tmp_path / "x.pt")
    code = (
        "import sys, torch; sys.modules['glmamba_monai'] = None; sys.modules['monai'] = None;"
        f"torch.save(torch.jit.load({str(path)!r})(torch.load('x.pt')).detach(), 'y.pt')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    torch.testing.assert_close(torch.load(tmp_path / "y.pt"), eager(network, x), rtol=1e-5, atol=1e-5)


# --- ONNX ---


@pytest.fixture
def onnxruntime():
    pytest.importorskip("onnxscript")
    return pytest.importorskip("onnxruntime", minversion="1.25")


def assert_onnx_equals_eager(onnxruntime, path, network):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["image"] and [o.name for o in session.get_outputs()] == ["pred"]
    for x in inputs():
        (y,) = session.run(None, {"image": x.numpy()})
        np.testing.assert_allclose(y, eager(network, x).numpy(), rtol=0, atol=1e-4)


@pytest.mark.slow
def test_onnx_by_the_command_equals_eager_at_any_size(onnxruntime, tmp_path, monkeypatch):
    network = trained_like("glmamba")
    torch.save(network.state_dict(), tmp_path / "model.pt")
    path = tmp_path / "model.onnx"
    monkeypatch.setattr(sys, "argv", ["glmamba_monai", "export-onnx", str(path), "--weights", f"{tmp_path}/model.pt"])
    main()
    assert_onnx_equals_eager(onnxruntime, path, network)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        pytest.param(
            "glmamba_light",
            {**SMALL, "lr_scan": "local", "ref_scan": "global", "fusion": "add"},
            marks=pytest.mark.slow,
        ),
        pytest.param("table1_lr_global", SMALL, marks=pytest.mark.slow),
        ("srcnn_ref", {}),
    ],
)
def test_onnx_of_the_other_networks_equals_eager_at_any_size(onnxruntime, tmp_path, name, arguments):
    from glmamba_monai.onnx_export import export_onnx

    network = trained_like(name, **arguments)
    export_onnx(network, tmp_path / "model.onnx")
    assert next(network.parameters()).requires_grad and not network.training  # left as it was
    assert_onnx_equals_eager(onnxruntime, tmp_path / "model.onnx", network)


def test_monai_bundle_onnx_export_refuses_and_names_the_command(onnxruntime, tmp_path):
    network = trained_like("glmamba_light")
    with pytest.raises(Exception, match="python -m glmamba_monai export-onnx"):
        exported(onnx_export, network, tmp_path, "model.onnx", network="glmamba_light", input_shape=[1, 2, 16, 16])
    assert not (tmp_path / "model.onnx").exists()


def test_the_export_overwrites_no_weights(tmp_path, monkeypatch, capsys):
    """Who names the weights alone means to export them."""
    weights = tmp_path / "model.pt"
    torch.save(trained_like("srcnn").state_dict(), weights)
    before = weights.read_bytes()
    monkeypatch.setattr(sys, "argv", ["glmamba_monai", "export-onnx", str(weights), "--network", "srcnn"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert f"output {weights}: the name must end in .onnx" in capsys.readouterr().err and weights.read_bytes() == before


def test_without_onnxscript_the_command_says_what_to_install(tmp_path, monkeypatch, capsys):
    torch.save(trained_like("srcnn").state_dict(), tmp_path / "model.pt")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.delitem(sys.modules, "glmamba_monai.onnx_export", raising=False)
    monkeypatch.delattr(glmamba_monai, "onnx_export", raising=False)
    arguments = [str(tmp_path / "m.onnx"), "--network", "srcnn", "--weights", str(tmp_path / "model.pt")]
    monkeypatch.setattr(sys, "argv", ["glmamba_monai", "export-onnx", *arguments])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "pip install" in capsys.readouterr().err and not (tmp_path / "m.onnx").exists()
