"""Two pieces of a network at the same time against one after the other."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from glmamba_monai.networks import build_network
from glmamba_monai.networks import glmamba as module
from glmamba_monai.ops import forgo_streams, side_by_side, streams

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
TINY = {"channels": 8, "n_mamba": 1, "n_deform": 1, "d_state": 2, "attention_reduction": 4, "mix_channels": 4}
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]


@pytest.fixture(autouse=True)
def _not_forgone(monkeypatch):
    monkeypatch.setattr(streams, "_forgone", False)


def one_after_the_other(first, a, second, b):
    return first(a), second(b)


@pytest.mark.parametrize("device", DEVICES)
def test_each_gets_its_argument(device):
    a, b = torch.rand(3, device=device), torch.rand(5, device=device)
    found = side_by_side(lambda x: x + 1, a, lambda x: x * 2, b)
    assert torch.equal(found[0], a + 1) and torch.equal(found[1], b * 2)


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("device", DEVICES)
def test_an_error_passes_through_and_the_next_call_works(device, failing):
    def fails(x):
        raise RuntimeError("no such thing")

    x = torch.rand(3, device=device)
    before = torch.cuda.current_stream() if device == "cuda" else None
    pieces = [torch.sin, torch.sin]
    pieces[failing] = fails
    with pytest.raises(RuntimeError, match="no such thing"):
        side_by_side(pieces[0], x, pieces[1], x)
    if device == "cuda":
        assert torch.cuda.current_stream() == before
    assert torch.equal(side_by_side(torch.sin, x, torch.cos, x)[1], torch.cos(x))


class OnGPU:
    """What looks like a tensor on a GPU, and writes down on which streams it is read."""

    is_cuda, device = True, torch.device("cuda", 0)

    def __init__(self, name, steps):
        self.name, self.steps = name, steps

    def record_stream(self, stream):
        self.steps.append(f"{self.name} is read {stream}")


class Stream(str):
    """The name of a stream, which writes down whom it waits for."""

    steps, current = [], ["here"]

    def wait_stream(self, other):
        self.steps.append(f"{self} waits for {other}")


@contextmanager
def work_on(stream):
    Stream.current.append(stream)
    yield
    Stream.current.pop()


@pytest.fixture
def steps(monkeypatch):
    """What is asked of the streams, without a GPU."""
    monkeypatch.setattr(Stream, "steps", [])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("here"))
    monkeypatch.setattr(torch.cuda, "stream", work_on)
    monkeypatch.setattr(streams, "_beside", lambda stream: Stream("beside"))
    return Stream.steps


@pytest.mark.parametrize("used", [True, False])
def test_what_is_done_on_which_stream(steps, used):
    if not used:
        forgo_streams()

    def piece(name):
        def run(argument):
            steps.append(f"{name} of {argument.name} {Stream.current[-1]}")
            return OnGPU(name, steps)

        return run

    found = side_by_side(piece("first"), OnGPU("a", steps), piece("second"), OnGPU("b", steps))
    assert [x.name for x in found] == ["first", "second"]
    if used:
        assert steps == [
            "beside waits for here",
            "b is read beside",
            "second of b beside",
            "first of a here",
            "here waits for beside",
            "second is read here",
        ]
    else:
        assert steps == ["first of a here", "second of b here"]


def test_streams_are_joined_after_an_error(steps):
    """The capture of a CUDA graph cannot be ended otherwise."""

    def fails(argument):
        raise RuntimeError("no memory left")

    with pytest.raises(RuntimeError, match="no memory left"):
        side_by_side(fails, OnGPU("a", steps), lambda b: b, OnGPU("b", steps))
    assert steps[-1] == "here waits for beside"


@needs_gpu
def test_forgone_streams_are_not_used(monkeypatch):
    forgo_streams()
    monkeypatch.setattr(torch.cuda, "stream", None)
    x = torch.rand(3, device="cuda")
    assert torch.equal(side_by_side(torch.sin, x, torch.cos, x)[1], torch.cos(x))


class Products(nn.Module):
    """So many products with one matrix, which keep what they multiply for their gradients."""

    def __init__(self, number):
        super().__init__()
        self.weight, self.number = nn.Parameter(torch.eye(1024)), number

    def forward(self, x):
        for _ in range(self.number):
            x = x @ self.weight
        return x


@needs_gpu
def test_results_wait_for_each_other():
    slow, quick = Products(40).cuda(), Products(1).cuda()
    for i in range(20):
        x = torch.full((1024, 1024), float(i), device="cuda", requires_grad=True)
        of_quick, of_slow = side_by_side(quick, x * 1, slow, x * 2)
        result = of_quick + of_slow
        result.sum().backward()
        assert torch.all(result == 3 * i) and torch.all(x.grad == 3)


@needs_gpu
def test_what_is_freed_meanwhile_is_not_written_over():
    """Two passes, one backward pass: the second one's input is freed while the slow piece has yet to read it, and the
    first one's gradients are made at once."""
    slow, quick = Products(40).cuda(), Products(1).cuda()

    def gradients(run):
        for piece in (slow, quick):
            piece.zero_grad()
        results = []
        for value in (1.0, 2.0):
            a, b = (torch.full((1024, 1024), value * factor, device="cuda") for factor in (1, 3))
            results += run(quick, a, slow, b)
            del a, b
        sum(results).sum().backward()
        return slow.weight.grad.clone(), quick.weight.grad.clone()

    expected = gradients(one_after_the_other)
    for _ in range(20):
        assert all(torch.equal(x, e) for x, e in zip(gradients(side_by_side), expected, strict=True))


@needs_gpu
@pytest.mark.parametrize("autocast", [False, True])
def test_the_network_is_the_same(autocast, monkeypatch):
    torch.manual_seed(0)
    network = build_network("glmamba", **TINY).cuda()
    nn.init.normal_(network.lr_head[-1].weight)
    x = torch.rand(2, 2, 40, 36, device="cuda")

    def results():
        network.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            y = network(x)
        y.float().square().mean().backward()
        return y.detach(), [p.grad.clone() for p in network.parameters()]

    found = [results() for _ in range(5)]
    monkeypatch.setattr(module, "side_by_side", one_after_the_other)
    y, gradients = results()
    for other, others in found:
        assert torch.equal(other, y)
        for p, q in zip(others, gradients, strict=True):
            # Some are summed atomically.
            torch.testing.assert_close(p, q, rtol=2e-2 if autocast else 1e-4, atol=1e-5 * float(q.abs().max()) + 1e-9)
