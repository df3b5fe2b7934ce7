"""The network against its paper: structure, cost, interface, and what each branch may and may not see."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from glmamba_monai.networks import NETWORKS, GLMamba, build_network, count_cost, edge_weight_of, upsampling_of
from glmamba_monai.networks.glmamba import (
    SS2D,
    ChannelAttention,
    DeformBlock,
    LateBiasConv2d,
    MambaBlock,
    MultiModalityFusion,
    OffsetsAndMask,
    ReconstructionHead,
)

TINY = {"channels": 8, "n_mamba": 1, "n_deform": 1, "d_state": 2, "attention_reduction": 4, "mix_channels": 4}
TABLE_1 = (
    "table1_lr_local",
    "table1_lr_global",
    "table1_modulator",
    "table1_ref_global",
    "table1_ref_local",
    "table1_fusion",
    "table1_edge_loss",
    "table1_guided",
)
BASELINES = ("srcnn", "srcnn_ref", "bicubic", "zero_filling")
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def randomised(network: nn.Module, seed: int = 0) -> nn.Module:
    """A network in which no part is silenced by its zero initialisation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return network.eval()


def tiny(name: str) -> nn.Module:
    """A registered network, small where its size is an argument."""
    torch.manual_seed(0)
    return randomised(build_network(name, **({} if name in BASELINES else TINY)))


# --- Registry and interface ---


def test_the_networks_of_the_tables_are_registered():
    assert set(NETWORKS.names) == {"glmamba", "glmamba_paper", "glmamba_light", *TABLE_1, *BASELINES}


@pytest.mark.parametrize("name", NETWORKS.names)
@pytest.mark.parametrize("size", [(8, 8), (9, 14), (16, 12), (31, 8)])
def test_one_tensor_in_and_out_of_any_size(name, size):
    x = torch.rand(2, 2, *size)
    with torch.no_grad():
        y = tiny(name)(x)
    assert y.shape == x.shape and y.dtype == x.dtype and bool(torch.isfinite(y).all())


@pytest.mark.parametrize("name", [n for n in NETWORKS.names if n.startswith(("glmamba", "table1", "srcnn"))])
def test_an_untrained_network_is_zero_filling(name):
    x = torch.rand(1, 2, 16, 16)
    torch.manual_seed(0)
    network = build_network(name, **({} if name in BASELINES else TINY))
    torch.testing.assert_close(network(x)[:, :1], x[:, :1], rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", ["table1_lr_local", "table1_lr_global", "table1_modulator", *BASELINES])
def test_without_a_reference_branch_the_reference_comes_back_untouched(name):
    x = torch.rand(1, 2, 12, 16)
    assert torch.equal(tiny(name)(x)[:, 1], x[:, 1])


@pytest.mark.parametrize(
    ("name", "sees"),
    [
        ("table1_lr_local", False),
        ("table1_lr_global", False),
        ("table1_modulator", False),
        ("srcnn", False),
        ("srcnn_ref", True),
        ("table1_ref_global", True),
        ("table1_ref_local", True),
        ("glmamba", True),
    ],
)
def test_who_sees_the_reference(name, sees):
    network, x = tiny(name), torch.rand(1, 2, 16, 16)
    other = x.clone()
    other[:, 1] = torch.rand(1, 16, 16)
    assert torch.equal(network(x)[:, 0], network(other)[:, 0]) is not sees


def test_in_the_paper_s_layout_the_branches_meet_in_the_fusion_block_alone():
    """Ours shows the reference to the low-resolution branch, too; the reference branch sees the reference alone."""
    x = torch.rand(1, 2, 16, 16)
    seen = {}
    for name in ("glmamba_paper", "glmamba"):
        network = tiny(name)
        for branch in ("lr_branch", "ref_branch"):
            getattr(network, branch).register_forward_pre_hook(
                lambda module, inputs, key=(name, branch): seen.__setitem__(key, inputs[0])
            )
        network(x)
    assert torch.equal(seen["glmamba_paper", "lr_branch"], x[:, :1])
    assert torch.equal(seen["glmamba", "lr_branch"], x)
    assert torch.equal(seen["glmamba_paper", "ref_branch"], x[:, 1:])
    assert torch.equal(seen["glmamba", "ref_branch"], x[:, 1:])


def test_the_rows_of_table_1_are_eight_different_trainings():
    shapes = []
    for name in TABLE_1:
        network = build_network(name, **TINY)
        scans = tuple(m.local for m in network.modules() if isinstance(m, SS2D))
        parts = tuple(n for n, _ in network.named_modules())
        shapes.append((scans, parts, network.guided, edge_weight_of(name)))
    assert len(set(shapes)) == 8
    assert [edge_weight_of(name) for name in TABLE_1] == [0, 0, 0, 0, 0, 0, 0.1, 0.1]
    assert [build_network(name, **TINY).guided for name in TABLE_1] == [False] * 7 + [True]


def test_upsampling_belongs_to_the_name():
    assert upsampling_of("bicubic") == "bicubic"
    assert {upsampling_of(name) for name in NETWORKS.names if name != "bicubic"} == {"zero_fill"}


@pytest.mark.parametrize(
    "arguments",
    [
        {"unembedding": "nearest"},
        {"lr_scan": "diagonal"},
        {"ref_scan": "none"},
        {"fusion": "sum"},
        {"attention_reduction": 0},
        {"channels": 8, "attention_reduction": 9},
    ],
)
def test_a_wrong_argument_is_named(arguments):
    with pytest.raises(ValueError, match=list(arguments)[-1]):
        GLMamba(**arguments)


def test_an_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match=r"'glmambo'.*glmamba_light.*srcnn_ref"):
        build_network("glmambo")


@pytest.mark.parametrize("shape", [(2, 16, 16), (1, 1, 16, 16), (1, 2, 7, 16), (1, 2, 16, 7)])
def test_a_wrong_input_is_refused(shape):
    with pytest.raises(ValueError, match=r"x must be \(B, 2, H, W\)"):
        tiny("glmamba")(torch.rand(shape))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
def test_a_tensor_of_monai_gives_what_a_plain_one_gives(device):
    """As MONAI's loaders hand it over: the operators and their gradients take it, too."""
    network, x, found = tiny("glmamba").to(device), torch.rand(1, 2, 12, 16, device=device), []
    for image in (x, MetaTensor(x)):
        network.zero_grad()
        result = network(image)
        result.square().sum().backward()
        found.append([result.detach(), *(parameter.grad.clone() for parameter in network.parameters())])
    for one, other in zip(*found):  # on a GPU sums may be taken in another order
        one, other = (tensor.cpu().as_subclass(torch.Tensor) for tensor in (one, other))
        torch.testing.assert_close(one, other, rtol=0 if device == "cpu" else 1e-4, atol=0 if device == "cpu" else 1e-5)


# --- Parts, against independent forms ---


def reference_ss2d(layer: SS2D, image: np.ndarray) -> np.ndarray:
    """SS2D of ``(H, W, D)`` in float64, pixel by pixel along explicit paths."""
    weights = {name: p.detach().double().numpy() for name, p in layer.named_parameters()}
    height, width, channels = image.shape
    rows = [(i, j) for i in range(height) for j in range(width)]
    columns = [(i, j) for j in range(width) for i in range(height)]
    result = np.zeros_like(image)
    for k, path in enumerate((rows, columns, rows[::-1], columns[::-1])):
        own = slice(k * channels, (k + 1) * channels)
        a, skip, bias = -np.exp(weights["A_log"][own]), weights["D"][own], weights["dt_bias"][own]
        state = np.zeros((channels, layer.d_state))
        for i, j in path:
            u = image[i, j]
            dt, b, c = np.split(weights["x_proj"][k] @ u, [layer.dt_rank, layer.dt_rank + layer.d_state])
            dt = np.log1p(np.exp(weights["dt_proj"][k] @ dt + bias))
            state = np.exp(dt[:, None] * a) * state + dt[:, None] * b[None] * u[:, None]
            result[i, j] += state @ c + skip * u
    return result


@pytest.mark.parametrize("local", [False, True])
def test_ss2d_follows_the_four_paths(local):
    torch.manual_seed(1)
    layer = SS2D(channels=6, d_state=3, dt_rank=2, local=local)
    x = torch.randn(2, 4, 8, 6)
    expected = np.zeros(x.shape)
    blocks = [(slice(i, i + 2), slice(j, j + 4)) for i in (0, 2) for j in (0, 4)]
    for b in range(2):
        for rows, columns in blocks if local else [(slice(None), slice(None))]:
            expected[b][rows, columns] = reference_ss2d(layer, x[b].double().numpy()[rows, columns])
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=1e-4, atol=1e-5)


def test_the_scan_starts_as_mamba_does():
    layer = SS2D(channels=48, d_state=16, dt_rank=6, local=False)
    a = -torch.exp(layer.A_log)
    torch.testing.assert_close(a, -torch.arange(1.0, 17).expand(192, 16), rtol=1e-5, atol=0)
    dt = nn.functional.softplus(layer.dt_bias.detach())
    assert float(dt.min()) >= 1e-3 * 0.99 and float(dt.max()) <= 1e-1 * 1.01


def test_local_scans_stay_in_their_quadrant_and_global_ones_do_not():
    for local in (True, False):
        layer = SS2D(channels=4, d_state=2, dt_rank=1, local=local)
        x = torch.randn(1, 8, 8, 4, requires_grad=True)
        layer(x)[0, :4, :4].sum().backward()
        outside = x.grad.clone()
        outside[:, :4, :4] = 0
        assert bool(outside.any()) is not local


def test_channel_attention_by_hand():
    attention = randomised(ChannelAttention(8, 4))
    x, y, bias = torch.randn(2, 5, 7, 8), torch.randn(2, 5, 7, 8), torch.randn(8)
    z = (y + bias).double().numpy()
    pooled = z.mean(axis=(1, 2))
    w1, b1 = (p.detach().double().numpy() for p in (attention.squeeze.weight, attention.squeeze.bias))
    w2, b2 = (p.detach().double().numpy() for p in (attention.excite.weight, attention.excite.bias))
    hidden = np.maximum(pooled @ w1[:, :, 0, 0].T + b1, 0)
    scale = 1 / (1 + np.exp(-(hidden @ w2[:, :, 0, 0].T + b2)))
    expected = x.double().numpy() + scale[:, None, None] * z
    np.testing.assert_allclose(attention(x, y, bias).detach().numpy(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(attention(x, y + bias, None), attention(x, y, bias))


@pytest.mark.parametrize("mix_channels", [0, 4])
def test_biases_that_are_left_to_the_next_step_change_nothing(mix_channels, monkeypatch):
    """As on a GPU, in float64: results and all gradients."""
    network = GLMamba(**TINY | {"mix_channels": mix_channels}).double()
    torch.manual_seed(0)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    x = torch.rand(1, 2, 16, 16, dtype=torch.float64)

    def results():
        y = network(x)
        return y.detach(), *torch.autograd.grad(y.square().sum(), list(network.parameters()))

    expected = results()
    monkeypatch.setattr(LateBiasConv2d, "_bias_is_late", lambda self, x: True)
    for found, e in zip(results(), expected, strict=True):
        torch.testing.assert_close(found, e)


def test_a_fresh_deform_block_is_a_convolution_at_half_weight():
    torch.manual_seed(0)
    block, x = DeformBlock(6), torch.randn(1, 6, 9, 11)
    expected = x + nn.functional.silu(nn.functional.conv2d(x, 0.5 * block.weight, block.bias, padding=1))
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)


def test_fusion_by_hand():
    torch.manual_seed(2)
    fusion = MultiModalityFusion(4)
    a, b = torch.randn(2, 4, 6, 5), torch.randn(2, 4, 6, 5)
    logits = fusion.complement_weights(torch.cat((a, b), 1)).double()
    w_a = 1 / (1 + torch.exp(logits[:, 1:2] - logits[:, 0:1]))  # a softmax over two, written as a sigmoid
    parts = [(a - b).double(), (a * b).double(), w_a * a + (1 - w_a) * b]
    pooled = torch.cat([p.flatten(2).max(-1).values for p in parts], 1)
    scores = pooled @ fusion.mixture_weights.weight.double().T + fusion.mixture_weights.bias.double()
    weights = torch.exp(scores) / torch.exp(scores).sum(1, keepdim=True)
    expected = sum(weights[:, i, None, None, None] * parts[i] for i in range(3))
    torch.testing.assert_close(fusion(a, b).double(), expected, rtol=1e-4, atol=1e-5)


# --- TorchScript, autocast, gradients ---


@pytest.mark.parametrize("name", ["glmamba", "glmamba_light", "table1_lr_local", "table1_ref_local", "srcnn_ref"])
def test_torchscript_equals_eager_at_any_size(name):
    network = tiny(name)
    scripted = torch.jit.script(network)
    for size in ((8, 8), (17, 22)):
        x = torch.rand(1, 2, *size)
        with torch.no_grad():
            torch.testing.assert_close(scripted(x), network(x), rtol=1e-5, atol=1e-5)


def test_autocast_stays_near_float32():
    network, x = tiny("glmamba"), torch.rand(1, 2, 16, 20)
    with torch.no_grad():
        expected = network(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = network(x)
    assert found.shape == expected.shape
    assert float((found.float() - expected).norm() / expected.norm()) < 2e-2


def test_every_parameter_learns():
    # Without reduction, so that no bottleneck of the attention happens to be dead at these weights.
    network = randomised(build_network("glmamba", **{**TINY, "attention_reduction": 1}))
    network(torch.rand(2, 2, 16, 16)).square().mean().backward()
    silent = [name for name, p in network.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert silent == []


@NEEDS_GPU
@pytest.mark.parametrize("name", ["glmamba", "table1_ref_local"])
def test_cuda_equals_cpu_with_all_gradients(name, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    network, x = randomised(tiny(name)), torch.rand(2, 2, 24, 36)

    def results(network, x):
        y = network(x)
        return y.detach().cpu(), *(g.cpu() for g in torch.autograd.grad(y.square().sum(), list(network.parameters())))

    expected = results(network, x)
    for found, e in zip(results(network.cuda(), x.cuda()), expected, strict=True):
        torch.testing.assert_close(found, e, rtol=1e-3, atol=1e-3 * float(e.abs().max()))


def kept_bytes(network: nn.Module, x: torch.Tensor) -> int:
    """What the forward pass keeps for the backward pass, each piece of memory once."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = network(x)
    del y
    return sum(kept.values())


@pytest.mark.parametrize(
    ("part", "method", "kept_instead", "maps"),
    [  # bytes in float32: two maps of D channels in each branch's block; one of C in full resolution in each head
        (
            MambaBlock,
            "_recomputed_scan_input",
            MambaBlock._scan_input,
            2 * 2 * (2 * 16 * 16 * 2 * TINY["channels"] * 4),
        ),
        (
            ReconstructionHead,
            "forward",
            lambda head, x: head._image(head[0](x, head.sharpness, head.sharpness)),
            2 * (2 * 32 * 32 * TINY["channels"] * 4),
        ),
    ],
    ids=["input of the scan", "end of the heads"],
)
def test_a_training_step_recomputes_what_is_cheap(monkeypatch, part, method, kept_instead, maps):
    torch.manual_seed(0)
    network, x = tiny("glmamba").train(), torch.rand(2, 2, 32, 32)
    nn.init.normal_(network.lr_head[-1].weight)  # at zero nothing comes through
    found, less = torch.autograd.grad(network(x).square().mean(), [*network.parameters()]), kept_bytes(network, x)
    monkeypatch.setattr(part, method, kept_instead)
    expected, more = torch.autograd.grad(network(x).square().mean(), [*network.parameters()]), kept_bytes(network, x)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    assert maps <= more - less < 1.05 * maps  # and the weights that only they need


@pytest.mark.parametrize("name", ["glmamba", "glmamba_paper"])
def test_the_first_convolutions_write_what_is_read_afterwards(name):
    """Channels last, with one image or two: else each map is copied, and a CPU takes eight times as long for it."""
    network, found = tiny(name), []
    for branch in (network.lr_branch, network.ref_branch):
        branch.stem.register_forward_hook(lambda *args: found.append(args[2]))
    network(torch.rand(2, 2, 12, 16))
    assert [y.is_contiguous(memory_format=torch.channels_last) for y in found] == [True, True]


@pytest.mark.parametrize("sharpness", [1.0, 3.0, 2.0**13])
def test_the_head_s_sharpness_is_that_of_its_activation(sharpness):
    torch.manual_seed(0)
    head, x = ReconstructionHead(6).double(), torch.randn(2, 6, 9, 7, dtype=torch.float64)
    head.sharpness.fill_(sharpness)
    first, last = ((head[i].weight, head[i].bias) for i in (0, 2))
    z = F.conv2d(x, *first, padding=1)
    expected = F.conv2d(F.gelu(sharpness * z) / sharpness, *last, padding=1)
    torch.testing.assert_close(head(x), expected)
    with_relu = F.conv2d(F.relu(z), *last, padding=1)
    assert ((head(x) - with_relu).abs().max() < 1e-4) == (sharpness > 1000)


# --- Cost (docs/method.md, cost) ---


@pytest.mark.parametrize(
    ("name", "parameters", "macs", "scan_flops", "paper_parameters", "paper_macs"),
    [
        ("glmamba", 2_241_399, 74_566_661_472, 12_828_672_000, 1_196_151, 32_453_227_872),
        ("glmamba_paper", 2_240_535, 74_516_895_072, 12_828_672_000, 1_195_287, 32_403_461_472),
        ("glmamba_light", 1_192_189, 32_176_780_128, 6_458_572_800, 792_637, 20_144_370_528),
        ("table1_ref_local", 2_322_322, 79_272_350_208, 12_828_672_000, 1_277_074, 37_158_916_608),
    ],
)
def test_cost_is_pinned(name, parameters, macs, scan_flops, paper_parameters, paper_macs):
    cost = count_cost(build_network(name), 240, 240)
    assert (cost.parameters, cost.macs, cost.scan_flops) == (parameters, macs, scan_flops)
    assert (cost.paper_parameters, cost.paper_macs) == (paper_parameters, paper_macs)


@pytest.mark.parametrize(
    ("name", "millions", "gmac", "paper_millions", "paper_gmac"),
    [("glmamba", 2.24, 74.5, 1.195, 32.42), ("glmamba_light", 1.191, 32.14, 0.792, 20.11)],
)
def test_cost_is_the_specification_s(name, millions, gmac, paper_millions, paper_gmac):
    """Within a per mille: the tool behind these figures also counted other layers, such as average pools."""
    cost = count_cost(build_network(name, guided=False), 240, 240)
    assert round(cost.parameters / 1e6, len(str(millions)) - 2) == millions
    assert round(cost.paper_parameters / 1e6, 3) == paper_millions
    assert math.isclose(cost.macs / 1e9, gmac, rel_tol=1e-3)
    assert math.isclose(cost.paper_macs / 1e9, paper_gmac, rel_tol=1e-3)


def test_guiding_costs_one_input_channel():
    paper, guided = (count_cost(build_network(n), 240, 240) for n in ("glmamba_paper", "glmamba"))
    assert guided.parameters - paper.parameters == 96 * 9
    assert guided.macs - paper.macs == 96 * 9 * 240 * 240


def test_replacing_the_fusion_adds_one_convolution():
    """The paper's own difference: one 96 to 96 3x3 convolution at 240x240, less the fusion block."""
    add, adaptive = (count_cost(build_network(n), 240, 240) for n in ("table1_ref_local", "glmamba_paper"))
    convolution, fusion = 96 * 96 * 9 + 96, (2 * 192 + 2) + (3 * 288 + 3)
    assert add.paper_parameters - adaptive.paper_parameters == convolution - fusion
    assert add.paper_macs - adaptive.paper_macs == (96 * 96 * 9 - 2 * 192) * 240 * 240 - 3 * 288


@pytest.mark.parametrize("name", ["glmamba", "glmamba_light", "srcnn_ref"])
def test_true_macs_against_pytorch_s_own_counter(name, monkeypatch):
    """PyTorch counts what is dispatched, also what is no part of the network, taken off here: the readout of the scan
    (B, C against the states) and the five outputs of zeros beside 27 offsets and masks."""
    for op in ("SCAN", "DEFORM"):  # it cannot look into the other backends
        monkeypatch.setenv(f"GLMAMBA_{op}_BACKEND", "torch")
    size = 16
    network = build_network(name)
    cost = count_cost(build_network(name), size, size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.rand(1, 2, size, size))
    tokens = (size // 2) ** 2
    readout = sum(tokens * m.A_log.numel() for m in network.modules() if isinstance(m, SS2D))
    unused = sum(size**2 * 5 * m.weight[0].numel() for m in network.modules() if isinstance(m, OffsetsAndMask))
    assert counter.get_total_flops() == 2 * (cost.macs + readout + unused)


def test_cost_grows_linearly_with_the_image():
    small, large = (count_cost(build_network("glmamba"), n, n) for n in (120, 240))
    assert math.isclose(large.macs / small.macs, 4, rel_tol=1e-4)
    assert large.scan_flops == 4 * small.scan_flops
