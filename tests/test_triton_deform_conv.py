"""The Triton kernels: on the GPU where there is one, else at small sizes in Triton's interpreter.

The interpreter must be chosen before Triton is imported, so without a GPU that is in a second process (conftest).
"""

import os

import pytest
import torch
from monai.data import MetaTensor, list_data_collate
from test_deform_conv import make_inputs, make_residual_inputs, relative, sampling_loop
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton", reason="needs the package triton")

from glmamba_monai.ops import deform_conv2d, deform_residual
from glmamba_monai.ops import triton_deform_conv as kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if ON_GPU else "cpu"

needs_kernels = pytest.mark.skipif(not (ON_GPU or INTERPRETED), reason="runs in the interpreter's process")
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")


@pytest.mark.skipif(ON_GPU or INTERPRETED, reason="the tests run in this process")
def test_in_the_interpreter(interpreter_run):
    assert interpreter_run.returncode == 0, interpreter_run.stdout[-5000:] + interpreter_run.stderr[-1000:]
    assert " passed" in interpreter_run.stdout


@pytest.fixture(autouse=True)
def _exact(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def on_device(inputs, dtype=None):
    return {name: None if x is None else x.to(DEVICE, dtype) for name, x in inputs.items() if name != "bias"}


def all_results(inputs, padding=1, grad=None):
    """Output and gradients of the kernels, by name."""
    pad = (padding, padding) if isinstance(padding, int) else padding
    given = [inputs[name] for name in ("input", "offset", "weight", "mask")]
    y = kernels.forward(*given, *pad)
    grad = cotangent(y) if grad is None else grad
    gradients = kernels.backward(grad, *given, *pad)
    found = dict(zip(("output", "input", "offset", "weight", "mask"), (y, *gradients)))
    return {name: x for name, x in found.items() if x is not None}


def cotangent(y):
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.device, y.dtype)


def expected_results(function, inputs, **options):
    """The same from a differentiable function, in float64."""
    leaves = {name: None if x is None else x.detach().double().requires_grad_() for name, x in inputs.items()}
    y = function(**leaves, **options)
    given = {name: x for name, x in leaves.items() if x is not None}
    grad = cotangent(y.to(next(iter(inputs.values())).dtype)).double()
    gradients = torch.autograd.grad(y, list(given.values()), grad)
    return {"output": y.detach()} | dict(zip(given, gradients))


def assert_close(found, expected, forward=1e-5, gradient=1e-4):
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert found[name].shape == x.shape, name
        assert relative(found[name], x) <= (forward if name == "output" else gradient), name


@needs_kernels
@pytest.mark.parametrize(
    "case",
    [
        {},
        {"mask": False},
        {"b": 1, "size": (9, 17), "c": 2, "out": 2},  # just over one tile
        {"b": 1, "c": 48, "out": 40, "size": (4, 5)},  # two blocks each, one a half of the other
        {"b": 1, "c": 35, "out": 144, "size": (2, 3)},  # several programs for the output's channels
        {"b": 1, "c": 1, "out": 1, "size": (2, 2)},
        {"padding": 0, "size": (5, 8)},
        {"padding": 2, "size": (4, 3), "kernel": (5, 5), "c": 2, "b": 1},
        {"padding": 0, "kernel": (1, 1)},
        {"padding": (0, 2), "kernel": (1, 3), "size": (3, 5)},
        {"spread": 30.0},  # nearly all outside
        {"spread": 6.0, "size": (3, 4)},
    ],
)
def test_equals_explicit_bilinear_sampling_with_all_gradients(case):
    inputs = make_inputs(bias=False, **case)
    # A few taps moved far beyond every border, beyond the range of a 32-bit integer too.
    inputs["offset"].flatten()[:6] = torch.tensor([1e4, -1e4, 3e9, -3e9, 1e20, -1e20])[: inputs["offset"].numel()]
    del inputs["bias"]
    padding = case.get("padding", 1)
    expected = expected_results(sampling_loop, inputs, padding=padding)
    assert_close(all_results(on_device(inputs), padding), {n: x.to(DEVICE) for n, x in expected.items()})


@needs_kernels
def test_addresses_beyond_32_bits_change_nothing(monkeypatch):
    inputs = on_device(make_inputs())
    expected = all_results(inputs)
    sizes = kernels._sizes
    monkeypatch.setattr(kernels, "_sizes", lambda *a: sizes(*a) | {"WIDE": True})
    assert_close(all_results(inputs), expected, 1e-7, 1e-6)


@needs_kernels
def test_any_memory_layout_is_accepted():
    inputs = on_device(make_inputs(c=4))
    expected = all_results(inputs)
    strided = {
        "input": inputs["input"].transpose(2, 3).contiguous().transpose(2, 3),
        "offset": inputs["offset"].contiguous(memory_format=torch.channels_last),
        "weight": inputs["weight"].transpose(0, 1).contiguous().transpose(0, 1),
        "mask": torch.stack((inputs["mask"], inputs["mask"]), -1)[..., 0],
    }
    grad = cotangent(expected["output"])
    found = all_results(strided, grad=torch.stack((grad, grad), -1)[..., 1])
    assert_close(found, expected, 1e-7, 1e-6)
    assert found["output"].is_contiguous(memory_format=torch.channels_last)
    assert found["input"].is_contiguous(memory_format=torch.channels_last)


@needs_kernels
@pytest.mark.parametrize("out", [2, 40, 144])  # one block, two, several programs
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_kernel_adds_the_bias(out, dtype):
    inputs = on_device(make_inputs(b=1, c=5, out=out, size=(3, 5)))
    inputs["input"] = inputs["input"].to(dtype)
    bias = torch.randn(out, 2, generator=torch.Generator().manual_seed(2)).to(DEVICE)[:, 1]  # not in one piece
    expected = kernels.forward(*inputs.values(), 1, 1).float() + bias.view(-1, 1, 1)
    found = kernels.forward(*inputs.values(), 1, 1, bias)
    assert found.dtype == dtype
    assert relative(found.float(), expected) <= (1e-6 if dtype == torch.float32 else 1e-3)


@needs_kernels
def test_a_broken_offset_shows_in_the_output_and_nowhere_else():
    inputs = on_device(make_inputs())
    expected = kernels.forward(*inputs.values(), 1, 1)
    inputs["offset"][0, 0, 2, 3] = float("nan")
    found = kernels.forward(*inputs.values(), 1, 1)
    assert found[0, :, 2, 3].isnan().all()
    found[0, :, 2, 3] = expected[0, :, 2, 3]
    assert torch.equal(found, expected)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_with_all_gradients_in_the_types_of_their_tensors(dtype):
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter multiplies no bfloat16 matrices")
    inputs = on_device(make_inputs(c=19, out=20, size=(4, 5)))
    for name in ("input", "mask"):
        inputs[name] = inputs[name].to(dtype)
    found = all_results(inputs)
    types = {"output": dtype, "input": dtype, "offset": torch.float32, "weight": torch.float32, "mask": dtype}
    assert {name: x.dtype for name, x in found.items()} == types
    # The kernels multiply in the input's type: so does the reference, but for the roundings in between.
    inputs["weight"] = inputs["weight"].to(dtype)
    assert_close(found, expected_results(deform_conv2d, inputs, backend="torch"), 2e-2, 2e-2)


@needs_kernels
def test_an_empty_batch_gives_empty_results():
    inputs = on_device(make_inputs(b=1))
    inputs |= {name: inputs[name][:0] for name in ("input", "offset", "mask")}
    found = all_results(inputs)
    assert found["output"].shape == (0, 4, 7, 9) and found["input"].shape == (0, 3, 7, 9)
    assert not found["weight"].any()


@pytest.fixture
def whole_step():
    """The backend triton of `deform_residual`, on CPU tensors in the interpreter."""
    from glmamba_monai.ops.deform_conv import _triton_deform_residual

    if INTERPRETED:
        library = torch.library.Library("glmamba", "IMPL")
        library.impl("deform_residual", kernels.residual_forward, "CPU")
        library.impl("deform_residual_backward", kernels.residual_backward, "CPU")
        yield _triton_deform_residual
        library._destroy()
    else:
        yield _triton_deform_residual


def whole_step_results(whole_step, inputs):
    given = {name: None if x is None else x.to(DEVICE).requires_grad_() for name, x in inputs.items()}
    y = whole_step(*given.values())
    given = {name: x for name, x in given.items() if x is not None}
    return {"output": y.detach()} | dict(zip(given, torch.autograd.grad(y, list(given.values()), cotangent(y))))


@needs_kernels
@pytest.mark.parametrize(
    "case",
    [
        {"b": 1},
        {"more": 0, "b": 1, "size": (9, 17), "c": 2},  # just over one tile
        {"b": 2, "size": (3, 4), "spread": 30.0},  # nearly all outside
    ]
    + ([{"b": 1, "c": 96, "size": (61, 47), "more": 5}] if ON_GPU else []),
)
def test_the_whole_step_equals_the_definition_with_all_gradients(case, whole_step):
    inputs = make_residual_inputs(**case)
    if case["b"] == 1:  # as in the network; else channels first
        for name in ("x", "predicted"):
            inputs[name] = inputs[name].contiguous(memory_format=torch.channels_last)
    expected = expected_results(deform_residual, inputs, backend="torch")
    found = whole_step_results(whole_step, inputs)
    assert not found["predicted"][:, 27:].any()
    assert_close(found, {name: x.to(DEVICE) for name, x in expected.items()})


@needs_kernels
def test_the_whole_step_in_half_precision_and_without_the_predictions_bias(whole_step):
    inputs = make_residual_inputs(c=19, size=(4, 5))
    for name in ("x", "predicted", "weight"):
        inputs[name] = inputs[name].half()
    inputs["predicted_bias"] = None
    expected = expected_results(deform_residual, inputs, backend="torch")
    found = whole_step_results(whole_step, inputs)
    assert all(x.dtype == inputs[name].dtype for name, x in found.items() if name != "output")
    assert_close(found, {name: x.to(DEVICE) for name, x in expected.items()}, 2e-2, 2e-2)


@needs_kernels
def test_the_whole_step_takes_a_batch_of_monai_and_checkpoints(whole_step):
    inputs = {name: x.to(DEVICE) for name, x in make_residual_inputs(size=(2, 3)).items()}
    expected = whole_step_results(whole_step, inputs)
    given = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    batch = list_data_collate([{"x": MetaTensor(x)} for x in given["x"]])["x"]
    y = checkpoint(whole_step, batch, *list(given.values())[1:], use_reentrant=False).as_tensor()
    found = {"output": y.detach()} | dict(zip(given, torch.autograd.grad(y, list(given.values()), cotangent(y))))
    assert_close(found, expected, 1e-6, 1e-5)


@needs_kernels
def test_the_operator_of_the_whole_step_passes_torchs_own_checks(whole_step):
    inputs = make_residual_inputs(b=1, size=(2, 3))
    given = [x.nan_to_num().to(DEVICE).requires_grad_() for x in inputs.values()]
    # Two runs of one kernel need not give the same bits on a GPU, where gradients are added atomically.
    torch.library.opcheck(torch.ops.glmamba.deform_residual.default, given, rtol=1e-4, atol=1e-5)


@needs_gpu
def test_on_a_gpu_the_whole_step_is_one_operator_unless_a_backend_is_forced(monkeypatch):
    inputs = {name: x.cuda() for name, x in make_residual_inputs().items()}
    expected = deform_residual(**{name: x.cpu() for name, x in inputs.items()}, backend="torch")

    def operators():
        with torch.profiler.profile() as profile:
            found = deform_residual(**inputs)
        assert relative(found.cpu(), expected) <= 1e-5
        return {event.key for event in profile.key_averages() if event.key.startswith("glmamba::")}

    assert operators() == {"glmamba::deform_residual"}
    monkeypatch.setenv("GLMAMBA_POINTWISE_BACKEND", "torch")
    assert operators() == {"glmamba::deform_conv2d"}
    monkeypatch.setenv("GLMAMBA_DEFORM_BACKEND", "torch")
    assert operators() == set()


@needs_gpu
@pytest.mark.parametrize(
    "case",
    [
        {"c": 96, "out": 96, "size": (61, 47)},
        {"c": 20, "out": 72, "size": (33, 70), "b": 1},
        {"c": 160, "out": 200, "size": (19, 30), "b": 3},
        {"c": 64, "out": 64, "size": (40, 40), "kernel": (5, 5), "padding": 2},
    ],
)
@pytest.mark.parametrize(
    ("dtype", "tf32", "forward", "gradient"),
    [
        (torch.float32, False, 1e-5, 1e-4),
        (torch.float32, True, 1e-3, 1e-3),
        (torch.bfloat16, True, 2e-2, 2e-2),
        (torch.float16, True, 2e-2, 2e-2),
    ],
)
def test_precisions_on_the_gpu(case, dtype, tf32, forward, gradient, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
    inputs = on_device(make_inputs(bias=False, **case))
    inputs["input"] = inputs["input"].to(dtype)
    padding = case.get("padding", 1)
    expected = expected_results(deform_conv2d, inputs, backend="torch", padding=padding)
    assert_close(all_results(inputs, padding), expected, forward, gradient)


@needs_gpu
def test_the_forward_pass_is_deterministic():
    inputs = on_device(make_inputs(c=96, out=96, size=(61, 47)))
    first = kernels.forward(*inputs.values(), 1, 1)
    assert all(torch.equal(first, kernels.forward(*inputs.values(), 1, 1)) for _ in range(5))
