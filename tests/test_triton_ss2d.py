"""The Triton kernels of the scan: on the GPU where there is one, else at tiny sizes in Triton's interpreter.

The interpreter must be chosen before Triton is imported, so without a GPU that is in a second process (conftest).
"""

import importlib
import os

import pytest
import torch
import torch.nn.functional as F
from test_ss2d import assert_close, make_inputs, relative, step_loop, value_and_gradients

pytest.importorskip("triton", reason="needs the package triton")

from glmamba_monai.ops import ss2d, ss2d_scan, triton_time_step
from glmamba_monai.ops import triton_ss2d as kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if ON_GPU else "cpu"

HALF_TOO = [torch.float32] + ([torch.bfloat16] if ON_GPU else [])

needs_kernels = pytest.mark.skipif(not (ON_GPU or INTERPRETED), reason="runs in the interpreter's process")
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")


@pytest.mark.skipif(ON_GPU or INTERPRETED, reason="the tests run in this process")
def test_in_the_interpreter(interpreter_run):
    assert interpreter_run.returncode == 0, interpreter_run.stdout[-5000:] + interpreter_run.stderr[-1000:]
    assert " passed" in interpreter_run.stdout


@pytest.fixture(autouse=True)
def _no_unwritten_memory(monkeypatch):
    """Fresh memory holds NaN, so that an element that no kernel writes shows."""

    def poisoned(function):
        def allocate(*args, **options):
            x = function(*args, **options)
            return x.fill_(torch.nan) if x.is_floating_point() else x

        return allocate

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


def programs(monkeypatch, number):
    """Cut the scan for this many programs a multiprocessor: more of them, more chunks."""
    monkeypatch.setattr(kernels, "PROGRAMS", number)
    monkeypatch.setattr(kernels, "TRAINING_PROGRAMS", number)


def all_results(inputs, local):
    """Output and gradients of the kernels, as `value_and_gradients` returns them."""
    y, *saved = kernels.forward(*inputs.values(), local)
    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    return y, dict(zip(inputs, kernels.backward(grad_y, *inputs.values(), local, *saved)))


def chunks(inputs, local):
    return kernels._Launch(inputs["u"], inputs["A"], local).chunks


@needs_kernels
@pytest.mark.parametrize(
    ("shape", "local", "several"),
    [
        ({"b": 1, "h": 2, "w": 5, "d": 9, "n": 3}, False, True),
        ({"b": 1, "h": 4, "w": 2, "d": 2, "n": 1}, True, True),
        ({"b": 2, "h": 3, "w": 1, "d": 1, "n": 2, "low": -20.0, "high": 30.0}, False, False),
    ],
)
def test_equals_the_step_loop_with_all_gradients(shape, local, several, monkeypatch):
    programs(monkeypatch, 1000 if several else 1e-6)
    inputs = make_inputs(**shape)
    expected = value_and_gradients(step_loop, inputs, local=local)
    inputs = {name: x.to(DEVICE) for name, x in inputs.items()}
    assert (chunks(inputs, local) > 1) == several
    y, gradients = all_results(inputs, local)
    assert y.dtype == torch.float32
    assert_close((y.cpu(), {name: x.cpu() for name, x in gradients.items()}), expected)


@pytest.fixture
def outside(monkeypatch):
    """A function that moves tensors into the middle of NaNs; and the numbers there that a kernel then loads.

    What is loaded ahead and not used shows in no result. In the interpreter every address is looked at.
    """
    places, loaded = [], []

    def surrounded(x):
        around = x.new_full((3, x.numel()), torch.nan)
        around[1] = x.flatten()
        first, size = around.data_ptr(), x.numel() * x.element_size()
        places.append((first, first + size, first + 2 * size, first + 3 * size))
        return around[1].view(x.shape)

    if INTERPRETED:
        interpreter = importlib.import_module("triton.runtime.interpreter")._interpreter
        load = interpreter.load

        def checked(pointers, mask, *others):
            at = pointers[mask]
            loaded.extend(x for a, b, c, d in places for x in at[((a <= at) & (at < b)) | ((c <= at) & (at < d))])
            return load(pointers, mask, *others)

        monkeypatch.setattr(interpreter, "load", checked)
    return surrounded, loaded


@needs_kernels
@pytest.mark.parametrize(
    ("h", "w", "local", "dtype", "also_masked"),
    [
        (2, 6, False, torch.float32, False),  # of two chunks of 3 lines, the 2 rows leave one in part and one empty
        (2, 2, False, torch.bfloat16, True),
        (4, 4, True, torch.float32, False),
    ]
    + ([(6, 2, local, dtype, True) for local in (False, True) for dtype in HALF_TOO] if ON_GPU else []),
)
def test_tiles_that_fill_everything_need_no_masks(h, w, local, dtype, also_masked, outside, monkeypatch):
    surrounded, loaded = outside
    scale, channels = (16, 64) if ON_GPU else (1, 4)
    if INTERPRETED:  # tiles that tiny maps fill
        monkeypatch.setattr(kernels, "CARRY", {4: kernels.Tile(2, 4), 2: kernels.Tile(2, 2)})
        monkeypatch.setattr(kernels, "FORWARD", kernels.Tile(2, 4))
        monkeypatch.setattr(kernels, "BACKWARD", kernels.Tile(2, 2, 2))
    programs(monkeypatch, 1)
    inputs = make_inputs(b=1, h=scale * h, w=scale * w, d=channels, n=2, device=DEVICE)
    inputs |= {name: inputs[name].to(dtype) for name in ("u", "delta", "B", "C")}
    expected = reference(inputs, local)
    inputs = {name: surrounded(x) for name, x in inputs.items()}
    launch = kernels._Launch(inputs["u"], inputs["A"], local)
    assert all(launch.even(tile) for tile in (*kernels.CARRY.values(), kernels.FORWARD, kernels.BACKWARD))
    found = all_results(inputs, local)
    assert_close(found, expected, gradient=1e-4 if dtype == torch.float32 else torch.finfo(dtype).eps)
    if also_masked:
        monkeypatch.setattr(kernels._Launch, "even", lambda *_: False)
        assert_close(found, all_results(inputs, local), 1e-7, 1e-6)
    assert not loaded


@pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter's process")
@pytest.mark.parametrize(
    ("size", "expected"),
    [({}, True), ({"h": 12}, False), ({"w": 12}, False), ({"d": 24}, False), ({"n": 3}, False)],
)
def test_where_tiles_fill_everything(size, expected):
    inputs = make_inputs(**({"b": 1, "h": 8, "w": 16, "d": 32, "n": 4} | size))
    assert kernels._Launch(inputs["u"], inputs["A"], False).even(kernels.Tile(8, 8, 2)) == expected


@needs_kernels
def test_any_memory_layout_is_accepted(monkeypatch):
    programs(monkeypatch, 1e-6)
    inputs = make_inputs(b=1, h=2, w=3, d=3, n=2, device=DEVICE)
    expected = all_results(inputs, False)
    layout = {name: torch.cat((x, x), -1)[..., : x.shape[-1]] for name, x in inputs.items()}  # parts of larger tensors
    layout["delta"] = inputs["delta"].movedim(3, 0).contiguous().movedim(0, 3)  # directions outermost
    assert_close(all_results(layout, False), expected, 1e-7, 1e-6)


@needs_kernels
def test_a_map_of_one_column_whose_strides_say_nothing(monkeypatch):
    programs(monkeypatch, 1e-6)
    inputs = make_inputs(b=1, h=4, w=1, d=3, n=2, device=DEVICE)
    expected = all_results(inputs, False)
    # Stored as one row: the stride of the axis of one element is that of the whole map.
    layout = {n: x.view(1, 1, 4, *x.shape[3:]).transpose(1, 2) if x.dim() > 3 else x for n, x in inputs.items()}
    assert layout["delta"].stride(2) != inputs["delta"].stride(2)
    assert_close(all_results(layout, False), expected, 1e-7, 1e-6)


@needs_kernels
def test_without_a_bias_delta_is_the_time_step(monkeypatch):
    programs(monkeypatch, 1000)
    inputs = make_inputs(b=1, h=2, w=4, d=3, n=2, low=-20.0, high=30.0, device=DEVICE)  # of delta
    y, expected = all_results(inputs, False)
    raw = inputs["delta"] + inputs["delta_bias"]
    found, gradients = all_results(inputs | {"delta": F.softplus(raw), "delta_bias": None}, False)
    assert_close((found, gradients), (y, expected), 1e-6, 1e-5)  # of delta and its bias: still before softplus


@needs_kernels
@pytest.mark.parametrize("shape", [(2, 3, 5, 19, 3), (1, 2, 2, 1, 1)] + ([(3, 50, 41, 192, 6)] if ON_GPU else []))
@pytest.mark.parametrize("dtype", HALF_TOO)
def test_the_time_step(shape, dtype, monkeypatch):
    monkeypatch.setattr(triton_time_step, "TILE", 64 if INTERPRETED else triton_time_step.TILE)
    *maps, channels, rank = shape
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(*maps, 4, 2 * rank + 5, generator=generator).to(dtype)
    weight, bias = (torch.randn(4, *x, generator=generator) for x in ((channels, rank), (channels,)))
    dt = rows[..., rank : 2 * rank]  # as in the network, a part of wider rows
    expected = F.softplus(torch.einsum("bhwkr,kdr->bhwkd", dt.double(), weight.double()) + bias.double())
    found = triton_time_step.time_step(rows.to(DEVICE)[..., rank : 2 * rank], weight.to(DEVICE), bias.to(DEVICE))
    assert found.dtype == dtype and relative(found.cpu(), expected) <= (1e-6 if dtype == torch.float32 else 1e-2)


@needs_kernels
@pytest.mark.parametrize("shape", [(2, 3, 15, 19, 3), (1, 9, 15, 1, 1)] + ([(3, 50, 41, 192, 6)] if ON_GPU else []))
@pytest.mark.parametrize("dtype", HALF_TOO)
@pytest.mark.parametrize("outermost", [True, False])  # the directions, as the time step has them
def test_the_gradients_of_the_time_step(shape, dtype, outermost, monkeypatch):
    monkeypatch.setattr(triton_time_step, "PROGRAMS", 4 if INTERPRETED else 1)  # of several tiles each
    *maps, channels, rank = shape
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(4, *maps, channels, generator=generator).to(dtype).permute(1, 2, 3, 0, 4)
    grad = grad.to(DEVICE) if outermost else grad.contiguous().to(DEVICE)
    rows = torch.randn(*maps, 4, 2 * rank + 5, generator=generator).to(dtype).to(DEVICE)
    weight = torch.randn(4, channels, rank, generator=generator).to(DEVICE)
    dt = rows[..., rank : 2 * rank]
    expected = (
        torch.einsum("bhwkd,kdr->bhwkr", grad.double(), weight.double()),
        torch.einsum("bhwkd,bhwkr->kdr", grad.double(), dt.double()),
    )
    by_kernel = triton_time_step.time_step_backward(grad, dt, weight)
    for found in (by_kernel, ss2d._project_backward(grad, dt, weight)):  # in float32 that is no kernel
        assert [x.dtype for x in found] == [dtype, torch.float32]
        for x, e in zip(found, expected, strict=True):
            assert x.shape == e.shape and relative(x, e) <= (1e-6 if dtype == torch.float32 else 1e-2)
    assert all(torch.equal(x, y) for x, y in zip(by_kernel, triton_time_step.time_step_backward(grad, dt, weight)))


# --- on a GPU ----------------------------------------------------------------------------------------------------

CASES = [
    ({"b": 1, "h": 61, "w": 47, "d": 192, "n": 16}, False),
    ({"b": 3, "h": 30, "w": 62, "d": 20, "n": 5}, True),
    ({"b": 1, "h": 40, "w": 72, "d": 96, "n": 16}, False),  # this one and the next are filled by tiles
    ({"b": 2, "h": 80, "w": 48, "d": 32, "n": 8}, True),
    ({"b": 2, "h": 33, "w": 70, "d": 35, "n": 17}, False),
    ({"b": 1, "h": 1, "w": 300, "d": 8, "n": 8}, False),
    ({"b": 1, "h": 300, "w": 1, "d": 8, "n": 8}, False),
    ({"b": 2, "h": 40, "w": 40, "d": 24, "n": 16, "low": -30.0, "high": -5.0}, False),
    ({"b": 2, "h": 40, "w": 40, "d": 24, "n": 16, "low": 5.0, "high": 60.0}, True),
]


def reference(inputs, local):
    doubled = {name: x.double() for name, x in inputs.items()}
    return value_and_gradients(ss2d_scan, doubled, local=local, backend="torch")


@needs_gpu
@pytest.mark.parametrize(("shape", "local"), CASES)
@pytest.mark.parametrize("number", [1e-6, None, 1000])
def test_large_maps_however_they_are_cut(shape, local, number, monkeypatch):
    if number is not None:
        programs(monkeypatch, number)
    inputs = make_inputs(**shape, device=DEVICE)
    assert (chunks(inputs, local) == 1) == (number == 1e-6) or number is None
    assert_close(all_results(inputs, local), reference(inputs, local))


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("local", [False, True])
def test_half_inputs_are_computed_in_single_precision(dtype, local):
    inputs = make_inputs(h=40, w=50, d=40, n=16, device=DEVICE)
    inputs |= {name: inputs[name].to(dtype) for name in ("u", "delta", "B", "C")}
    y, gradients = value_and_gradients(ss2d_scan, inputs, local=local, backend="triton")
    expected = reference(inputs, local)
    assert y.dtype == torch.float32 and relative(y, expected[0]) <= 1e-5
    for name, x in gradients.items():
        assert x.dtype == inputs[name].dtype
        # Only the last rounding is left.
        assert relative(x, expected[1][name]) <= (1e-4 if x.dtype == torch.float32 else torch.finfo(dtype).eps), name


@pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter's process")
@pytest.mark.parametrize("number", range(1, 10))
def test_the_backward_pass_takes_over_the_chunks(number):
    for longest in range(1, 30):
        u, A = torch.zeros(1, longest, 1, 1), torch.zeros(4, 1, 1)
        first = kernels._Launch(u, A, False, chunks=number)
        again = kernels._Launch(u, A, False, chunks=first.chunks)
        assert (again.chunk, again.chunks) == (first.chunk, first.chunks)


@needs_kernels
def test_the_backward_pass_follows_either_cut(monkeypatch):
    monkeypatch.setattr(kernels, "PROGRAMS", 1e-6)
    monkeypatch.setattr(kernels, "TRAINING_PROGRAMS", 1000)
    inputs = make_inputs(b=1, h=2, w=1, d=2, n=1, device=DEVICE)
    expected = reference(inputs, False)
    for training, count in ((False, 1), (True, 2)):
        y, *saved = kernels.forward(*inputs.values(), False, training)
        assert [x.shape[2] for x in saved] == [count, count]
        grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
        assert_close((y, dict(zip(inputs, kernels.backward(grad_y, *inputs.values(), False, *saved)))), expected)


@needs_gpu
def test_the_forward_pass_is_deterministic():
    inputs = make_inputs(h=60, w=60, d=96, n=16, device=DEVICE)
    first = kernels.forward(*inputs.values(), False)[0]
    assert all(torch.equal(first, kernels.forward(*inputs.values(), False)[0]) for _ in range(5))


@needs_gpu
@pytest.mark.parametrize("layout", ["plain", "directions outermost", "part"])
@pytest.mark.parametrize("local", [False, True])
def test_the_operator_passes_torchs_own_checks(local, layout, monkeypatch):
    monkeypatch.undo()  # those checks compare fresh memory
    inputs = make_inputs(h=30, w=40, d=17, n=5, device=DEVICE)
    if layout == "directions outermost":
        inputs["delta"] = inputs["delta"].movedim(3, 0).contiguous().movedim(0, 3)
    elif layout == "part":
        inputs |= {n: torch.cat((inputs[n],) * 2, -1)[..., : inputs[n].shape[-1]] for n in ("delta", "B", "C")}
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    torch.library.opcheck(torch.ops.glmamba.ss2d_scan.default, (*inputs.values(), local), rtol=1e-4, atol=1e-4)
