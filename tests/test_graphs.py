"""The CUDA graphs of the training against the network as it is."""

import copy
import gc

import pytest
import torch
from torch import nn

from glmamba_monai.engines import GradientLimit, GraphInferer
from glmamba_monai.engines import graphs as module
from glmamba_monai.engines.graphs import Graphs, captured, flat_gradient
from glmamba_monai.networks import NETWORKS, build_network
from glmamba_monai.ops import streams

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
TINY = {"channels": 8, "n_mamba": 1, "n_deform": 1, "d_state": 2, "attention_reduction": 4, "mix_channels": 4}


@pytest.fixture(autouse=True)
def _no_streams_forgone(monkeypatch):
    """A capture that fails here shall not change what the tests after it run."""
    monkeypatch.setattr(streams, "_forgone", False)


def losses_of_training(network, inferer, batches, autocast=False):
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    losses = []
    for x in batches:
        optimizer.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
            loss = (inferer(x, network) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_nothing_is_collected_during_a_capture(monkeypatch, fails, before):
    collecting = []
    monkeypatch.setattr(gc, "collect", lambda: collecting.append("collected"))
    monkeypatch.setattr(gc, "isenabled", lambda: before)
    monkeypatch.setattr(gc, "disable", lambda: collecting.append("off"))
    monkeypatch.setattr(gc, "enable", lambda: collecting.append("on"))

    def capture(network, inputs):
        collecting.append("captured")
        if fails:
            raise RuntimeError("it waits for the GPU")
        return network

    monkeypatch.setattr(module, "Graphs", capture)
    captured(nn.Conv2d(2, 2, 3), torch.rand(1, 2, 8, 8))
    assert collecting == ["collected", "off", "captured"] + ["on"] * before
    assert streams._forgone == fails


def test_on_a_cpu_the_network_runs_as_it_is():
    network, x = nn.Conv2d(2, 2, 3), torch.rand(1, 2, 8, 8)
    inferer = GraphInferer()
    assert torch.equal(inferer(x, network), network(x)) and not inferer._graphs


class TwoLayers(nn.Module):
    """A network with a frozen parameter and one that is used twice."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 1, 1)
        self.first.bias.requires_grad_(False)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x))) * self.second.weight.mean()


@pytest.fixture
def two_layers():
    torch.manual_seed(0)
    return TwoLayers()


@pytest.fixture
def repeated(monkeypatch):
    """What would be recorded is run again, so that all that is around a CUDA graph runs without a GPU."""
    monkeypatch.setattr(module, "recorded", lambda work: [torch.enable_grad()(piece) for piece in work])


def gradients(network):
    return [parameter.grad for parameter in network.parameters() if parameter.requires_grad]


def batches_of(number):
    return torch.rand(number, 4, 2, 8, 8, generator=torch.Generator().manual_seed(1))


def test_a_training_with_gradients_in_one_piece_is_the_training_without(repeated, two_layers):
    other = copy.deepcopy(two_layers)
    graphs = Graphs(two_layers, torch.zeros(4, 2, 8, 8))
    found = losses_of_training(two_layers, lambda x, network: graphs(x), batches_of(5))
    expected = losses_of_training(other, lambda x, network: network(x), batches_of(5))
    assert found == expected and len(set(expected)) == 5
    assert two_layers.first.bias.grad is None
    flat = flat_gradient(list(two_layers.parameters()))
    assert torch.equal(flat, torch.cat([gradient.flatten() for gradient in gradients(other)]))


@pytest.mark.parametrize("to_none", [True, False])
def test_gradients_are_added_to_those_that_are_there(repeated, two_layers, to_none):
    """To those of an earlier batch, to another's and to zeros."""
    other = copy.deepcopy(two_layers)
    graphs = Graphs(two_layers, torch.zeros(4, 2, 8, 8))
    ones = torch.ones_like(two_layers.second.weight)
    for network, run in ((two_layers, graphs), (other, other)):
        optimizer = torch.optim.SGD(network.parameters(), 0.1)
        for x in batches_of(2):
            run(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=to_none)
        network.second.weight.grad = ones.clone()
        for x in batches_of(3):
            run(x).square().mean().backward()
    for found, expected in zip(gradients(two_layers), gradients(other), strict=True):
        assert torch.allclose(found, expected, rtol=1e-6, atol=0)
    assert flat_gradient(list(two_layers.parameters())) is not None


def test_a_gradient_belongs_to_the_last_call(repeated, two_layers):
    graphs, x = Graphs(two_layers, torch.zeros(4, 2, 8, 8)), batches_of(2)
    first, second = graphs(x[0]), graphs(x[1])
    with pytest.raises(RuntimeError, match="once a call, before it is called again"):
        first.sum().backward()
    loss = second.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once a call"):
        loss.backward()
    graphs(x[0]).sum().backward()


@pytest.mark.parametrize("hooked", [0, 1])
def test_no_hook_of_a_parameter_is_called_for_nothing(repeated, two_layers, hooked):
    graphs = Graphs(two_layers, torch.zeros(4, 2, 8, 8))
    seen = []
    weight = (two_layers.first.weight, two_layers.second.weight)[hooked]
    weight.register_hook(seen.append)
    graphs(batches_of(1)[0]).sum().backward()
    (gradient,) = seen
    assert gradient.shape == weight.shape and gradient.abs().sum() > 0


def test_graphs_are_outdated_when_a_parameter_is_frozen_or_moved(repeated, two_layers):
    graphs = Graphs(two_layers, torch.zeros(4, 2, 8, 8))
    assert not graphs.outdated()
    two_layers.first.bias.requires_grad_(True)
    assert graphs.outdated()
    two_layers.first.bias.requires_grad_(False)
    two_layers.load_state_dict(TwoLayers().state_dict())
    assert not graphs.outdated()
    two_layers.second.weight.data = two_layers.second.weight.data.clone()
    assert graphs.outdated()


class TwoResults(TwoLayers):
    def forward(self, x):
        return x, super().forward(x)


@pytest.mark.parametrize(
    "network",
    [
        nn.Tanh(),
        TwoLayers().requires_grad_(False),
        nn.Sequential(TwoLayers(), nn.Conv2d(1, 1, 1).double()),
        TwoLayers().to(memory_format=torch.channels_last),
        TwoResults(),
    ],
)
def test_a_network_that_does_not_suit_runs_as_it_is(repeated, network, caplog):
    assert captured(network, torch.zeros(4, 2, 8, 8)) is network
    assert "cannot be captured" in caplog.text


def test_all_our_networks_suit():
    for name in NETWORKS.names:
        parameters = list(build_network(name).parameters())
        assert all(p.is_contiguous() and p.dtype == parameters[0].dtype for p in parameters), name


class OnGPU(torch.Tensor):
    """A tensor that says it lies on a GPU."""

    is_cuda = True


class InParallel(nn.parallel.DistributedDataParallel):
    def __init__(self, network):
        nn.Module.__init__(self)
        self.network = network

    def forward(self, x):
        return self.network(x)


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_which_calls_run_as_graphs(repeated, two_layers, monkeypatch):
    monkeypatch.setattr(module, "captured", Graphs)
    inferer, other = GraphInferer(), copy.deepcopy(two_layers)
    x = torch.rand(4, 2, 8, 8).as_subclass(OnGPU)

    def graphs_after(network, x):
        inferer(x, network)
        return list(inferer._graphs.values())

    first = graphs_after(two_layers, x)
    assert len(first) == 1 and graphs_after(two_layers, x) == first
    for network, inputs in (
        (two_layers, torch.rand(4, 2, 8, 8)),
        (two_layers, x.clone().requires_grad_()),
        (two_layers.forward, x),
        (InParallel(two_layers), x),
        (copy.deepcopy(two_layers).eval(), x),
    ):
        assert graphs_after(network, inputs) == first
    with torch.no_grad():
        assert graphs_after(two_layers, x) == first
    wants_gradient = x.clone().requires_grad_()
    inferer(wants_gradient, two_layers).sum().backward()
    assert wants_gradient.grad.any()
    assert torch.equal(inferer(x, other), other(x)) and len(inferer._graphs) == 2  # each network its own
    second = graphs_after(two_layers, x[:2])
    assert len(second) == 3 and graphs_after(two_layers, x[:3]) == second  # no more than that
    two_layers.first.bias.requires_grad_(True)
    third = graphs_after(two_layers, x)
    assert len(third) == 3 and first[0] not in third


def test_the_result_belongs_to_autograd(repeated, two_layers):
    """Gradients wait for the backward pass, whatever is computed of the result."""
    graphs = Graphs(two_layers, torch.zeros(4, 2, 8, 8))
    y = graphs(batches_of(1)[0])
    assert y.requires_grad and gradients(two_layers) == [None] * 3
    (3 * y).sum().backward()
    tripled = [gradient.clone() for gradient in gradients(two_layers)]
    two_layers.zero_grad()
    graphs(batches_of(1)[0]).sum().backward()
    for found, expected in zip(tripled, gradients(two_layers), strict=True):
        assert torch.allclose(found, 3 * expected)


def test_gradients_of_their_own_are_not_one_piece(repeated, two_layers):
    parameters = list(two_layers.parameters())
    assert flat_gradient([]) is None and flat_gradient(parameters) is None
    two_layers(batches_of(1)[0]).sum().backward()
    assert flat_gradient(parameters) is None
    two_layers.zero_grad()
    Graphs(two_layers, torch.zeros(4, 2, 8, 8))(batches_of(1)[0]).sum().backward()
    flat = flat_gradient(parameters)
    assert flat.shape == (sum(p.numel() for p in parameters if p.requires_grad),)
    assert flat_gradient(parameters[:1]) is None  # the others have a part in it
    parameters[-1].grad = parameters[-1].grad.clone()
    assert flat_gradient(parameters) is None
    parameters[-1].grad = None
    assert flat_gradient(parameters) is None


@pytest.mark.parametrize("longest", [0.01, 1e3])
def test_the_limit_of_a_gradient_in_one_piece(repeated, two_layers, longest, monkeypatch):
    other = copy.deepcopy(two_layers)
    other(batches_of(1)[0]).sum().backward()
    before = [gradient.clone() for gradient in gradients(other)]
    GradientLimit(other, longest)(None)
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", None)  # not by that one
    Graphs(two_layers, torch.zeros(4, 2, 8, 8))(batches_of(1)[0]).sum().backward()
    GradientLimit(two_layers, longest)(None)
    for found, expected, unlimited in zip(gradients(two_layers), gradients(other), before, strict=True):
        assert torch.allclose(found, expected, rtol=1e-6, atol=0)
        assert torch.equal(expected, unlimited) == (longest > 1)


@needs_gpu
@pytest.mark.parametrize("autocast", [False, True])
def test_a_training_by_graphs_is_the_training_without(autocast):
    torch.manual_seed(0)
    network = build_network("glmamba", **TINY).cuda()
    sizes = [24, 32, 24, 32, 40, 48, 24]  # more shapes than graphs
    batches = [torch.rand(2, 2, size, 24, device="cuda") for size in sizes]
    inferer, other = GraphInferer(), copy.deepcopy(network)
    found = losses_of_training(network, inferer, batches, autocast)
    expected = losses_of_training(other, lambda x, network: network(x), batches, autocast)
    assert [type(graphs) for graphs in inferer._graphs.values()] == [Graphs] * inferer.MAX_GRAPHS
    assert len({round(x, 6) for x in expected}) == len(sizes)
    # Some gradients are summed atomically, so the last bits differ between any two runs.
    assert found == pytest.approx(expected, rel=2e-2 if autocast else 1e-4)


@needs_gpu
def test_validation_runs_the_network_as_it_is():
    network = build_network("glmamba", **TINY).cuda()
    inferer, x = GraphInferer(), torch.rand(1, 2, 24, 24, device="cuda")
    with torch.no_grad():
        inferer(x, network)
    inferer(x, network.eval())
    assert not inferer._graphs


@needs_gpu
def test_a_gradient_outlives_the_next_forward_pass():
    torch.manual_seed(0)
    network = build_network("glmamba", **TINY).cuda()
    inferer, x = GraphInferer(), torch.rand(2, 2, 24, 24, device="cuda")
    inferer(x, network).square().mean().backward()
    flat = flat_gradient(list(network.parameters()))
    before = flat.clone()
    inferer(x + 1, network)
    assert before.any() and torch.equal(flat, before)


@needs_gpu
def test_what_cannot_be_captured_runs_as_it_is(caplog):
    class Waits(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) * float(x.mean())

    network, x = Waits(2, 2, 3).cuda(), torch.rand(1, 2, 8, 8, device="cuda")
    before = torch.cuda.current_stream()
    assert torch.equal(GraphInferer()(x, network), network(x))
    assert "cannot be captured" in caplog.text and torch.cuda.current_stream() == before
    first, second = (torch.rand(8, device="cuda") for _ in range(2))
    assert not torch.equal(first, second)
