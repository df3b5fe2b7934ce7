"""Two pieces of a network at the same time against one after the other."""

import pytest
import torch
from torch import nn

from glmamba_monai.networks import build_network
from glmamba_monai.networks import glmamba as module
from glmamba_monai.ops import side_by_side

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
TINY = {"channels": 8, "n_mamba": 1, "n_deform": 1, "d_state": 2, "attention_reduction": 4, "mix_channels": 4}
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]


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
    pieces = [torch.sin, torch.sin]
    pieces[failing] = fails
    with pytest.raises(RuntimeError, match="no such thing"):
        side_by_side(pieces[0], x, pieces[1], x)
    if device == "cuda":
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.equal(side_by_side(torch.sin, x, torch.cos, x)[1], torch.cos(x))


@needs_gpu
def test_what_is_freed_meanwhile_is_not_written_over():
    """The second piece is slow, and both throw away what they read and make other things of the same size."""

    class Piece(nn.Module):
        def __init__(self, products):
            super().__init__()
            self.weight, self.products = nn.Parameter(torch.eye(1024)), products

        def forward(self, x):
            for _ in range(self.products):
                x = x @ self.weight
            return x

    slow, quick = Piece(40).cuda(), Piece(1).cuda()
    for i in range(20):
        x = torch.full((1024, 1024), float(i), device="cuda", requires_grad=True)
        of_quick, of_slow = side_by_side(quick, x * 1, slow, x * 2)
        other = torch.full_like(of_quick, torch.nan)  # takes the place of whatever has been freed
        result = of_quick + of_slow
        del of_quick, of_slow, other
        spoiled = torch.full_like(result, torch.nan)
        result.sum().backward()
        del spoiled
        assert torch.all(result == 3 * i) and torch.all(x.grad == 3)
        assert torch.allclose(slow.weight.grad, slow.weight.grad[:1, :1].expand_as(slow.weight.grad))
        slow.zero_grad()


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
