"""The optimiser Muon: against singular value decomposition, torch's Muon for single matrices and torch's Adam."""

import copy
import pickle
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigParser
from torch import nn

from glmamba_monai.engines import Muon, WeightAverage, parameter_groups
from glmamba_monai.engines import muon as module
from glmamba_monai.engines.graphs import WARM_UP_PASSES
from glmamba_monai.engines.muon import UPDATE_SIZE, RecordedUpdate, Stacks, orthogonalized
from glmamba_monai.networks import NETWORKS, build_network
from glmamba_monai.ops import streams

SMALL = {"channels": 16, "n_mamba": 1, "n_deform": 1, "attention_reduction": 4, "mix_channels": 8}
RATE = 0.01
# Of the kinds that a network has: tall, wide, of full rank and not, a convolution's, a stack of matrices.
SHAPES = [(12, 20), (30, 7), (40, 40), (5, 90), (8, 6, 3, 3), (9, 4, 1, 1), (3, 10, 24), (2, 24, 5)]


def numbers(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def parameters(shapes):
    return [nn.Parameter(numbers(*shape, seed=seed)) for seed, shape in enumerate(shapes)]


def optimizer_of(matrices, others=(), **options):
    groups = [{"params": list(matrices), "matrices": True}, {"params": list(others), "matrices": False}]
    return Muon(groups, RATE, **options)


def gradients(leaves, step):
    for i, leaf in enumerate(leaves):
        leaf.grad = numbers(*leaf.shape, seed=1000 * step + i)


@pytest.mark.parametrize(("rows", "columns"), [(7, 30), (16, 16), (1, 5)])
def test_singular_vectors_stay_and_singular_values_come_near_1(rows, columns):
    matrices = numbers(3, rows, columns, dtype=torch.float64)
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    turned = u.mT @ orthogonalized(matrices) @ v.mT
    values = turned.diagonal(dim1=-2, dim2=-1)
    assert (turned - torch.diag_embed(values)).abs().max() < 1e-9
    assert values.min() > 0.6 and values.max() < 1.25


def test_zeros_that_fill_up_change_nothing_and_no_gradient_gives_no_update():
    matrix = numbers(1, 6, 10)
    filled = torch.zeros(2, 9, 14)
    filled[:1, :6, :10] = matrix
    found = orthogonalized(filled)
    torch.testing.assert_close(found[:1, :6, :10], orthogonalized(matrix))
    found[:1, :6, :10] = 0
    assert not found.any()


def test_the_matrices_are_updated_as_by_torch_s_muon_one_by_one():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch before 2.9 has no Muon")
    leaves = parameters(SHAPES)
    start = [leaf.detach().clone() for leaf in leaves]
    alone = [nn.Parameter(matrix.clone()) for leaf in leaves for matrix in single_matrices(leaf.detach())]
    # match_rms_adamw: 0.2 rates
    theirs = torch.optim.Muon(alone, RATE * UPDATE_SIZE / 0.2, weight_decay=0, adjust_lr_fn="match_rms_adamw")
    ours = optimizer_of(leaves)
    for step in range(4):
        gradients(leaves, step)
        for parameter, gradient in zip(alone, [g for leaf in leaves for g in single_matrices(leaf.grad)], strict=True):
            parameter.grad = gradient.clone()
        ours.step()
        theirs.step()
    moved = iter(alone)
    for leaf, before in zip(leaves, start, strict=True):
        expected = torch.stack([next(moved).detach() for _ in single_matrices(before)]).view_as(before) - before
        # theirs is computed in bfloat16
        assert (leaf - before - expected).norm() / expected.norm() < 0.02, list(leaf.shape)


def single_matrices(parameter):
    """A stack's matrices ``(B, M, N)``; of a convolution's weight the one that takes a patch."""
    return parameter.flatten(1)[None] if parameter.ndim == 4 else parameter.view(-1, *parameter.shape[-2:])


def test_an_update_of_full_rank_has_the_size_that_is_named():
    leaf = nn.Parameter(torch.zeros(32, 50))
    leaf.grad = numbers(32, 50)
    optimizer_of([leaf]).step()
    assert leaf.square().mean().sqrt().item() == pytest.approx(UPDATE_SIZE * RATE, rel=0.2)


def test_all_else_is_updated_as_by_torch_s_adam():
    found, expected = parameters([(5,), (768, 16)]), parameters([(5,), (768, 16)])
    ours, theirs = optimizer_of(parameters([(8, 8)]), found), torch.optim.Adam(expected, RATE, betas=(0.9, 0.95))
    for step in range(3):
        for leaves in (found, expected):
            gradients(leaves, step)
        gradients(ours.param_groups[0]["params"], step)
        ours.step()
        theirs.step()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", NETWORKS.names)
def test_every_parameter_of_every_network_has_its_group(name):
    with torch.device("meta"):
        network = build_network(name)
    if not any(True for _ in network.parameters()):
        with pytest.raises(ValueError, match=f"network '{name}' has no parameters"):
            parameter_groups(network, name)
        return
    matrices, others = parameter_groups(network, name)
    assert (matrices["matrices"], others["matrices"]) == (True, False)
    assert {*map(id, matrices["params"]), *map(id, others["params"])} == {*map(id, network.parameters())}
    assert len(matrices["params"]) + len(others["params"]) == sum(1 for _ in network.parameters())


def test_what_of_glmamba_is_no_matrix():
    with torch.device("meta"):
        network = build_network("glmamba")
    matrices, _ = parameter_groups(network, "glmamba")
    kept = {id(parameter) for parameter in matrices["params"]}
    left = {
        path.removesuffix(".weight").rpartition(".")[2]
        for path, parameter in network.named_parameters()
        if parameter.ndim > 1 and id(parameter) not in kept
    }
    assert left == {
        "A_log",  # a number for each channel and state
        "depthwise",  # each channel on its own
        "stem",  # from one or two images
        "2",  # the heads' last convolution, to one
        "mixture_weights",  # to three maps
        "complement_weights",  # to two
        "squeeze",  # to three channels
        "excite",  # from them
    }


def test_it_learns_and_a_loaded_state_goes_on_with_the_same_bits():
    torch.manual_seed(0)
    network = build_network("glmamba_light", **SMALL)
    image = numbers(2, 2, 16, 16).abs()
    target = image + 0.1

    def steps(network, optimizer, count):
        losses = []
        for _ in range(count):
            optimizer.zero_grad()
            loss = (network(image) - target).abs().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    optimizer = Muon(parameter_groups(network, "glmamba_light"), 1e-3)
    first = steps(network, optimizer, 5)
    copied, state = copy.deepcopy(network), copy.deepcopy(optimizer.state_dict())
    both = pickle.loads(pickle.dumps((network, optimizer)))
    whole = steps(network, optimizer, 5)
    assert whole[-1] < 0.8 * first[0]
    again = Muon(parameter_groups(copied, "glmamba_light"), 1e-3)
    again.load_state_dict(state)
    assert steps(copied, again, 5) == whole
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), copied.parameters(), strict=True))
    assert steps(*both, 5) == whole


def test_a_frozen_parameter_is_left_out():
    network = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 6))
    network[0].requires_grad_(False)
    optimizer = Muon(parameter_groups(network, "two layers"), RATE)
    gradients(network[1].parameters(), 0)
    before = [parameter.detach().clone() for parameter in network.parameters()]
    optimizer.step()
    assert [torch.equal(a, b) for a, b in zip(network.parameters(), before, strict=True)] == [True, True, False, False]


def test_the_overlay_trains_by_it_at_its_own_rate():
    parser = ConfigParser()
    configs = Path(__file__).parent.parent / "bundle" / "configs"
    parser.read_config([str(configs / f"{name}.json") for name in ("train", "train_general", "train_muon")])
    parser.update({"device": "$torch.device('cpu')", "network": "srcnn_ref"})
    optimizer = parser.get_parsed_content("optimizer")
    assert isinstance(optimizer, Muon)
    assert [group["lr"] for group in optimizer.param_groups] == [0.0004] * 2
    assert parser.get_parsed_content("average").network is not parser.get_parsed_content("net")


def test_a_schedule_sets_the_rate_of_both_groups_and_a_hook_is_called_once_a_step():
    network = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 6))
    optimizer = Muon(parameter_groups(network, "two layers"), RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step < 1))
    average = WeightAverage(network, optimizer)
    for _ in range(2):
        gradients(network.parameters(), 0)
        optimizer.step()
        kept = [parameter.detach().clone() for parameter in network.parameters()]
        schedule.step()
    assert average.steps == 2
    gradients(network.parameters(), 1)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), kept, strict=True))  # a rate of 0


def test_what_cannot_be_is_refused():
    network = nn.Linear(6, 5)
    with pytest.raises(ValueError, match=r"params: found groups with matrices=\[None, None\], expected those of"):
        Muon(list(network.parameters()), RATE)
    optimizer = Muon(parameter_groups(network, "a layer"), RATE)
    before = network.bias.detach().clone()
    network.bias.grad = torch.ones(5)
    with pytest.raises(ValueError, match=r"a matrix of shape \[5, 6\]: found no gradient, expected one"):
        optimizer.step()
    assert torch.equal(network.bias, before)
    with pytest.raises(ValueError, match="closure: found one, expected None"):
        optimizer.step(lambda: 0.0)


def warmed_up(work):
    """Stands for `recorded`: warms up as that does; a replay is the work itself."""
    for _ in range(WARM_UP_PASSES):
        for piece in work:
            piece()
    return work


def test_a_recorded_update_changes_nothing_until_it_is_run(monkeypatch):
    monkeypatch.setattr(module, "recorded", warmed_up)
    kept, expected = [numbers(3, 4), numbers(5)], [numbers(3, 4), numbers(5)]

    def update(tensors, gradients, rate):
        torch._foreach_mul_(tensors, 0.9)  # changes them where gradients are 0, too
        torch._foreach_sub_(tensors, [gradient * rate for gradient in gradients])

    run = RecordedUpdate(lambda gradients, rate: update(kept, gradients, rate), kept, kept, key=())
    assert all(torch.equal(a, b) for a, b in zip(kept, expected, strict=True))
    for step in range(3):
        of_step = [numbers(3, 4, seed=step), numbers(5, seed=10 + step)]
        run(of_step, 0.1 * step)
        update(expected, of_step, torch.tensor(0.1 * step))
    assert all(torch.equal(a, b) for a, b in zip(kept, expected, strict=True))


def test_an_update_that_cannot_be_recorded_changes_nothing(monkeypatch):
    monkeypatch.setattr(streams, "_forgone", False)

    def cannot(work):
        work[0]()
        raise RuntimeError("it waits for the GPU")

    monkeypatch.setattr(module, "recorded", cannot)
    kept = [numbers(3, 4)]
    with pytest.raises(RuntimeError, match="it waits for the GPU"):
        RecordedUpdate(lambda gradients, rate: kept[0].mul_(2), kept, kept, key=())
    assert torch.equal(kept[0], numbers(3, 4)) and streams._forgone


def steps_of(leaves, optimizer, steps):
    """Steps, each at a lower rate than the one before."""
    for step in steps:
        for i, leaf in enumerate(leaves):
            leaf.grad = numbers(*leaf.shape, seed=1000 * step + i).to(leaf.device)
        for group in optimizer.param_groups:
            group["lr"] = RATE / (1 + step)
        optimizer.step()


def follows_what_changes(placed, **options):
    """By graphs it does what it does without: momentum, states, moved parameters and copies."""
    results = []
    for recordable in (False, True):
        leaves = [nn.Parameter(placed(leaf.detach())) for leaf in parameters([*SHAPES, (7,)])]
        optimizer = optimizer_of(leaves[:-1], leaves[-1:], **options)
        optimizer._recordable = recordable
        steps_of(leaves, optimizer, range(3))
        state = pickle.loads(pickle.dumps(optimizer.state_dict()))
        steps_of(leaves, optimizer, range(3, 5))
        optimizer.load_state_dict(state)
        steps_of(leaves, optimizer, range(3, 5))
        optimizer.param_groups[0]["momentum"] = 0.5
        steps_of(leaves, optimizer, range(5, 7))
        assert recordable == (optimizer._recorded is not None)
        recorded = optimizer._recorded
        steps_of(leaves, optimizer, range(7, 8))
        assert optimizer._recorded is recorded  # once is enough
        for leaf in leaves:
            leaf.data = leaf.data.clone()
        steps_of(leaves, optimizer, range(8, 10))
        assert not recordable or optimizer._recorded is not recorded
        copied = pickle.loads(pickle.dumps((leaves, optimizer)))
        for one in [(leaves, optimizer), copied]:
            steps_of(*one, range(10, 12))
            results.append(one[0])
    first, *others = results
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


class OnGPU(torch.Tensor):
    """A tensor that says it lies on a GPU."""

    is_cuda = True


def test_a_graph_follows_what_changes(monkeypatch):
    monkeypatch.setattr(module, "recorded", warmed_up)
    monkeypatch.setattr(module, "capturing", lambda tensor: nullcontext())
    follows_what_changes(lambda leaf: leaf.as_subclass(OnGPU))


def test_no_graph_is_kept_on_a_cpu_nor_in_a_distributed_training(monkeypatch):
    monkeypatch.setattr(module, "recorded", warmed_up)
    monkeypatch.setattr(module, "capturing", lambda tensor: nullcontext())
    leaves = [nn.Parameter(leaf.detach().as_subclass(OnGPU)) for leaf in parameters(SHAPES)]
    optimizer = optimizer_of(leaves)
    for on_gpu, distributed in ((True, False), (True, True), (True, False), (False, False)):
        monkeypatch.setattr(OnGPU, "is_cuda", on_gpu)
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda distributed=distributed: distributed)
        steps_of(leaves, optimizer, range(1))
        assert (optimizer._recorded is not None) == (on_gpu and not distributed)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@needs_gpu
def test_on_a_gpu_it_does_what_it_does_on_a_cpu():
    results = []
    for device in ("cpu", "cuda"):
        leaves = [nn.Parameter(leaf.detach().to(device)) for leaf in parameters([*SHAPES, (7,)])]
        optimizer = optimizer_of(leaves[:-1], leaves[-1:], fused=device == "cuda")
        start = [leaf.detach().clone() for leaf in leaves]
        steps_of(leaves, optimizer, range(3))
        results.append([(leaf - before).detach().cpu() for leaf, before in zip(leaves, start, strict=True)])
    for expected, found in zip(*results, strict=True):
        assert (found - expected).norm() / expected.norm() < 0.02


@needs_gpu
def test_on_a_gpu_its_graph_follows_what_changes():
    follows_what_changes(lambda leaf: leaf.cuda(), fused=True)


class WaitingStacks(Stacks):
    def orthogonalized(self, updates, rate):
        assert updates[0].sum().isfinite().item()  # waits for the GPU
        return super().orthogonalized(updates, rate)


@needs_gpu
def test_on_a_gpu_it_goes_on_without_a_graph_where_it_cannot_have_one(monkeypatch, caplog):
    monkeypatch.setattr(streams, "_forgone", False)
    before, results = torch.cuda.current_stream(), []
    for waits in (False, True):
        leaves = [nn.Parameter(leaf.detach().cuda()) for leaf in parameters(SHAPES)]
        optimizer = optimizer_of(leaves)
        if waits:
            monkeypatch.setattr(optimizer, "_stacks", WaitingStacks(leaves))
        steps_of(leaves, optimizer, range(3))
        assert optimizer._recordable != waits and streams._forgone == waits
        results.append(leaves)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert caplog.text.count("cannot be captured as a CUDA graph") == 1 and torch.cuda.current_stream() == before
    first, second = (torch.rand(8, device="cuda") for _ in range(2))
    assert not torch.equal(first, second)
