import multiprocessing
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from test_deform_conv import make_inputs as deform_inputs
from test_deform_conv import sampling_loop

from glmamba_monai.ops import backends, native

try:
    TABLES, REASON = native._tables(), ""
except ImportError as error:
    TABLES, REASON = [], str(error)
pytestmark = pytest.mark.skipif(not TABLES, reason=f"the native kernels are not there: {REASON}")


def test_a_cpu_without_the_kernels_is_told_how_to_get_them(monkeypatch, caplog):
    real = backends._try_load
    backends.require_backends("cpu")
    assert not caplog.text
    absent = (None, "ImportError: no compiler")
    monkeypatch.setattr(backends, "_try_load", lambda op, name: absent if name == "native" else real(op, name))
    backends.require_backends("cpu")
    for op in ("ss2d_scan", "deform_conv2d"):
        assert f"{op}: runs on PyTorch's own operations here, several times slower" in caplog.text
    assert "no compiler" in caplog.text and "install a C compiler" in caplog.text and "pointwise" not in caplog.text
    caplog.clear()
    monkeypatch.setenv("GLMAMBA_SCAN_BACKEND", "torch")  # wanted so
    monkeypatch.setenv("GLMAMBA_DEFORM_BACKEND", "torch")
    backends.require_backends("cpu")
    assert not caplog.text


SCAN_NAMES = ("u", "delta", "A", "B", "C", "D", "delta_bias")
GUARD = 64


@pytest.fixture(autouse=True)
def _two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[table.name.decode() for table in TABLES] or [""])
def _every_instruction_set(request, monkeypatch):
    table = next(table for table in TABLES if table.name.decode() == request.param)
    monkeypatch.setattr(native, "_tables", lambda: [table])


def scan_inputs(b=1, h=5, w=7, d=5, n=3, low=-5.0, high=1.0, rate=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        "u": torch.randn(b, h, w, d, generator=g),
        "delta": low + (high - low) * torch.rand(b, h, w, 4, d, generator=g),
        "A": -rate * (torch.arange(n) + 0.5 + torch.rand(4, d, n, generator=g)),
        "B": torch.randn(b, h, w, 4, n, generator=g),
        "C": torch.randn(b, h, w, 4, n, generator=g),
        "D": torch.randn(4, d, generator=g),
        "delta_bias": 0.1 * torch.randn(4, d, generator=g),
    }


def step_by_step(u, delta, A, B, C, D, delta_bias, local):
    """The definition in float64, one position at a time."""
    u, delta, A, B, C, D, delta_bias = (x.double() for x in (u, delta, A, B, C, D, delta_bias))
    batch, height, width, _ = u.shape
    h, w = (height // 2, width // 2) if local else (height, width)
    rows = [(i, j) for i in range(h) for j in range(w)]
    columns = [(i, j) for j in range(w) for i in range(h)]
    y = {}
    for top in range(0, height, h):
        for left in range(0, width, w):
            for k, order in enumerate((rows, columns, rows[::-1], columns[::-1])):
                state = u.new_zeros(batch, u.shape[3], A.shape[2])
                for i, j in order:
                    at = (slice(None), top + i, left + j)
                    x = delta[at][:, k] + delta_bias[k]
                    dt = torch.log1p(torch.exp(-x.abs())) + x.clamp(min=0)  # (B, D)
                    state = torch.exp(dt[..., None] * A[k]) * state + (dt * u[at])[..., None] * B[at][:, k, None]
                    out = (state * C[at][:, k, None]).sum(-1) + D[k] * u[at]
                    y[at[1:]] = y.get(at[1:], 0) + out
    return torch.stack([y[i, j] for i in range(height) for j in range(width)], 1).view(u.shape)


def relative(a, b):
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def native_scan(inputs, local, grad_y):
    y, states = native.scan_forward(*inputs.values(), local)
    return y, native.scan_backward(grad_y, *inputs.values(), local, states)


def check_scan(inputs, local=False):
    leaves = [x.double().requires_grad_() for x in inputs.values()]
    expected = step_by_step(*leaves, local)
    grad_y = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    y, gradients = native_scan(inputs, local, grad_y)
    assert relative(y, expected) <= 1e-5
    for name, found, wanted in zip(SCAN_NAMES, gradients, torch.autograd.grad(expected, leaves, grad_y.double())):
        assert found.shape == wanted.shape
        assert relative(found, wanted) <= 1e-4, name


# --- scan --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_every_instruction_set")
@pytest.mark.parametrize(
    ("shape", "local"),
    [
        ({"d": 1, "n": 1, "h": 1, "w": 1}, False),
        ({"d": 5, "n": 3}, False),
        ({"d": 19, "n": 8, "h": 8, "w": 6, "b": 3}, True),
        ({"d": 192, "n": 16, "h": 9, "w": 15}, False),  # several channel groups and chunks of positions
        ({"d": 16, "n": 9, "h": 2, "w": 34, "b": 3}, True),
    ],
)
def test_scan_equals_the_recurrence_with_all_gradients(shape, local):
    check_scan(scan_inputs(**shape), local)


@pytest.mark.usefixtures("_every_instruction_set")
@pytest.mark.parametrize("rate", [0.01, 5.0])
def test_scan_with_very_small_and_very_large_steps(rate):
    check_scan(scan_inputs(h=9, w=8, d=19, n=8, low=-20.0, high=20.0, rate=rate))  # dt * A down to -850


@pytest.mark.usefixtures("_every_instruction_set")
def test_time_step_is_relatively_accurate_for_every_size():
    x = torch.linspace(-80, 80, 8001)
    channels = x.numel()
    ones, zeros = torch.ones(1, 1, 1, 4, 1), torch.zeros(4, channels)
    u = torch.ones(1, 1, 1, channels)
    y, _ = native.scan_forward(u, x.expand(1, 1, 1, 4, -1), zeros[..., None] - 1, ones, ones, zeros, zeros, False)
    expected = 4 * F.softplus(x.double(), threshold=1000)
    assert float(((y.flatten() - expected) / expected).abs().max()) <= 1e-6


@pytest.mark.usefixtures("_every_instruction_set")
def test_decay_is_accurate_and_ends_at_zero():
    exponent = torch.cat((-torch.logspace(-6, 1.9, 4000), torch.tensor([-100.0, -200.0, -1e4, -3e38, -torch.inf])))
    channels = exponent.numel()
    u = torch.zeros(1, 1, 2, channels)
    u[:, :, 0] = 1
    delta = torch.full((1, 1, 2, 4, channels), 20.0)  # softplus(20) is 20 in float32
    A = (exponent / 20).expand(4, -1)[..., None]
    B = C = torch.zeros(1, 1, 2, 4, 1).index_fill(3, torch.tensor([0]), 1.0)  # only along the row
    zeros = torch.zeros(4, channels)
    y, _ = native.scan_forward(u, delta, A, B, C, zeros, zeros, False)
    found = y[0, 0, 1].double() / y[0, 0, 0].double()
    size = (exponent / 20).double() * 20
    assert (found[-4:] == 0).all()
    assert float((found / torch.exp(size) - 1)[:4000].abs().div(1 - size[:4000]).max()) <= 3e-7


@pytest.mark.usefixtures("_every_instruction_set")
@pytest.mark.parametrize("name", SCAN_NAMES)
def test_nan_is_not_hidden(name):
    inputs = scan_inputs()
    inputs[name].view(-1)[0] = torch.nan
    assert native.scan_forward(*inputs.values(), False)[0].isnan().any()


def test_scan_of_strided_inputs():
    inputs = scan_inputs(d=19)
    strided = {name: x.transpose(-1, -2).contiguous().transpose(-1, -2) for name, x in inputs.items()}
    grad_y = torch.randn(inputs["u"].shape, generator=torch.Generator().manual_seed(1))
    y, gradients = native_scan(inputs, False, grad_y)
    y2, gradients2 = native_scan(strided, False, grad_y.flip(1).contiguous().flip(1))
    assert torch.equal(y, y2) and all(torch.equal(a, b) for a, b in zip(gradients, gradients2))


# --- deformable convolution --------------------------------------------------------------------------------------


def check_deform(case):
    inputs = deform_inputs(**case, bias=False)
    del inputs["bias"]
    inputs["offset"].flatten()[:6] = torch.tensor([1e4, -1e4, 3e9, -3e9, 1e20, -1e20])
    padding = case.get("padding", 1)
    pad = (padding, padding) if isinstance(padding, int) else padding
    leaves = {name: None if x is None else x.double().requires_grad_() for name, x in inputs.items()}
    expected = sampling_loop(**leaves, padding=padding)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    assert relative(native.deform_forward(*inputs.values(), *pad), expected) <= 1e-5
    found = native.deform_backward(grad, *inputs.values(), *pad)
    given = {name: x for name, x in leaves.items() if x is not None}
    wanted = dict(zip(given, torch.autograd.grad(expected, list(given.values()), grad.double())))
    for name, gradient in zip(inputs, found):
        assert (gradient is None) == (name not in wanted)
        if gradient is not None:
            assert gradient.shape == wanted[name].shape
            assert relative(gradient, wanted[name]) <= 1e-4, name


@pytest.mark.usefixtures("_every_instruction_set")
@pytest.mark.parametrize(
    "case",
    [
        {},
        {"mask": False},
        {"padding": 2, "size": (4, 3), "kernel": (5, 5), "c": 2, "b": 1},
        {"padding": (0, 2), "kernel": (1, 3), "size": (3, 5)},
        {"spread": 30.0, "c": 8},  # nearly all outside
        {"c": 37, "out": 21, "size": (13, 11), "b": 1},  # several bands; widths that fill no vector
        {"c": 16, "out": 48, "size": (3, 2), "b": 3},
    ],
)
def test_deform_equals_explicit_bilinear_sampling_with_all_gradients(case):
    check_deform(case)


def test_deform_does_not_depend_on_the_memory_order_and_returns_channels_last():
    inputs = deform_inputs(c=20, bias=False)
    del inputs["bias"]
    grad = torch.randn(2, 4, 7, 9, generator=torch.Generator().manual_seed(1))
    last = {name: x.to(memory_format=torch.channels_last) for name, x in inputs.items()}
    found = [native.deform_forward(*x.values(), 1, 1) for x in (inputs, last)]
    assert torch.equal(*found) and found[0].is_contiguous(memory_format=torch.channels_last)
    grads = [native.deform_backward(grad, *x.values(), 1, 1) for x in (inputs, last)]
    assert all(torch.equal(a, b) for a, b in zip(*grads))
    assert all(grads[0][i].is_contiguous(memory_format=torch.channels_last) for i in (0, 1, 3))


# --- threads and memory ------------------------------------------------------------------------------------------


def everything(scan, deform):
    """All results of both operations for fixed inputs."""
    y, states = native.scan_forward(*scan.values(), True)
    grads = native.scan_backward(torch.ones_like(y), *scan.values(), True, states)
    z = native.deform_forward(*deform.values(), 1, 1)
    return [y, *grads, z, *native.deform_backward(torch.ones_like(z), *deform.values(), 1, 1)]


def all_inputs():
    deform = deform_inputs(c=20, size=(30, 40), bias=False)
    del deform["bias"]
    return scan_inputs(b=2, h=18, w=20, d=100, n=16), deform


def test_the_number_of_threads_changes_no_bit():
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(everything(*all_inputs()))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


def test_calls_from_several_threads_do_not_mix():
    inputs = all_inputs()
    expected = everything(*inputs)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: everything(*inputs), range(8)):
            assert all(torch.equal(a, b) for a, b in zip(found, expected))


def _child(inputs, expected):
    torch.set_num_threads(2)
    sys.exit(0 if torch.equal(native.scan_forward(*inputs.values(), False)[0], expected) else 1)


@pytest.mark.skipif(sys.platform != "linux", reason="fork is safe on Linux only")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_starts_its_own_threads():
    inputs = scan_inputs(d=40)
    expected, _ = native.scan_forward(*inputs.values(), False)  # the parent's threads exist by now
    process = multiprocessing.get_context("fork").Process(target=_child, args=(inputs, expected))
    process.start()
    process.join(60)
    process.kill()
    assert process.exitcode == 0


@pytest.mark.usefixtures("_every_instruction_set")
@pytest.mark.parametrize("channels", [1, 5, 16, 19, 100])
def test_nothing_is_written_outside_the_results(monkeypatch, channels):
    buffers = []

    def guarded(*shape):
        size = torch.Size(shape).numel()
        buffers.append((torch.full((size + 2 * GUARD,), 123.0), size))
        return buffers[-1][0][GUARD : GUARD + size].view(shape)

    scan = scan_inputs(b=2, h=6, w=8, d=channels, n=3)
    deform = deform_inputs(c=channels, out=channels + 2, bias=False)
    del deform["bias"]
    inputs = [*scan.values(), *deform.values()]
    before = [x.clone() for x in inputs]
    expected = everything(scan, deform)
    monkeypatch.setattr(native, "_new", guarded)
    assert all(torch.equal(a, b) for a, b in zip(everything(scan, deform), expected))
    assert all(torch.equal(a, b) for a, b in zip(inputs, before))
    assert len(buffers) == 13
    for buffer, size in buffers:
        assert (buffer[:GUARD] == 123).all() and (buffer[GUARD + size :] == 123).all()


# --- availability ------------------------------------------------------------------------------------------------


def test_load_returns_the_module():
    assert native.load() is native


def test_a_missing_build_is_an_import_error_that_says_so(monkeypatch):
    monkeypatch.setattr(native, "EXTENSION_SUFFIXES", [".nowhere"])
    native._tables.cache_clear()
    try:
        with pytest.raises(ImportError, match=r"no compiled _kernels\.nowhere in .*without a C compiler"):
            native.load()
    finally:
        native._tables.cache_clear()


def test_other_dtypes_are_refused():
    inputs = {name: x.double() for name, x in scan_inputs().items()}
    with pytest.raises(TypeError, match=r"found torch\.float64 on cpu, expected torch\.float32"):
        native.scan_forward(*inputs.values(), False)
