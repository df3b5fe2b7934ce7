"""The loss against NumPy and SciPy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import convolve

from glmamba_monai.losses import ContrastiveEdgeLoss, GLMambaLoss

# Spec section 3, with the -1 that an edge kernel needs in the last place of the second.
EDGES = [
    np.array([[0, -1, 0], [-1, 4, -1], [0, -1, 0]]),
    np.array([[-1, 0, -1], [0, 4, 0], [-1, 0, -1]]),
    np.array([[1, 1, 1], [1, -8, 1], [1, 1, 1]]),
]


def images(channels, shape=(3, 13, 17), seed=0):
    rng = np.random.default_rng(seed)
    batch, height, width = shape
    return [torch.from_numpy(rng.normal(1.0, 0.5, (batch, channels, height, width))) for _ in range(2)]


def edge_loss(sr, hr):
    """Mean over kernels of the mean squared difference of the edges; SciPy's "mirror" is PyTorch's "reflect"."""
    sr, hr = (np.asarray(x, dtype=np.float64)[:, 0] for x in (sr, hr))
    per_kernel = [
        np.mean([(convolve(a, e, mode="mirror") - convolve(b, e, mode="mirror")) ** 2 for a, b in zip(sr, hr)])
        for e in EDGES
    ]
    return np.mean(per_kernel)


@pytest.mark.parametrize("shape", [(1, 2, 2), (3, 13, 17), (2, 32, 9)])
def test_edge_loss_is_the_formula(shape):
    sr, hr = images(1, shape)
    assert ContrastiveEdgeLoss()(sr, hr).item() == pytest.approx(edge_loss(sr, hr), rel=1e-5)


def test_kernels_are_those_of_the_paper_and_sum_to_zero():
    kernels = ContrastiveEdgeLoss().kernels
    assert kernels.shape == (3, 1, 3, 3)
    np.testing.assert_array_equal(kernels[:, 0].numpy(), EDGES)
    assert kernels.sum(dim=(1, 2, 3)).tolist() == [0, 0, 0]
    hr = images(1)[0].float()
    assert ContrastiveEdgeLoss()(hr + 7.5, hr).item() < 1e-9  # so a constant has no edges


def test_nothing_of_it_is_trained_or_saved():
    loss = GLMambaLoss()
    assert not list(loss.parameters()) and not loss.state_dict()


@pytest.mark.parametrize("edge_weight", [None, 0, 0.5])
def test_whole_loss_is_the_formula(edge_weight):
    output, truth = images(2, seed=1)
    loss = GLMambaLoss() if edge_weight is None else GLMambaLoss(edge_weight=edge_weight)
    o, t = output.numpy(), truth.numpy()
    expected = 0.7 * np.abs(o[:, 0] - t[:, 0]).mean() + 0.3 * np.abs(o[:, 1] - t[:, 1]).mean()
    expected += (0.1 if edge_weight is None else edge_weight) * edge_loss(o[:, :1], t[:, :1])
    assert loss(output, truth).item() == pytest.approx(expected, rel=1e-5)
    assert loss(truth, truth).item() == 0


def test_the_reference_channel_has_no_edge_term():
    output, truth = images(2)
    output[:, 0] = truth[:, 0]
    assert GLMambaLoss()(output, truth).item() == pytest.approx(
        0.3 * (output[:, 1] - truth[:, 1]).abs().mean().item(), rel=1e-6
    )


def test_gradient_reaches_both_channels():
    output, truth = (x[:1, :, :6, :5].float() for x in images(2))
    output.requires_grad_()
    GLMambaLoss()(output, truth).backward()
    gradient = output.grad[0, :, 2, 3].double()
    for channel in (0, 1):
        shifted = [output.detach().double() for _ in range(2)]
        for sign, x in zip((1, -1), shifted):
            x[0, channel, 2, 3] += sign * 1e-3
        o = [
            0.7 * (x[:, 0] - truth[:, 0]).abs().mean()
            + 0.3 * (x[:, 1] - truth[:, 1]).abs().mean()
            + 0.1 * edge_loss(x[:, :1], truth[:, :1])
            for x in shifted
        ]
        assert gradient[channel].item() == pytest.approx((o[0] - o[1]).item() / 2e-3, rel=1e-4)


@pytest.mark.parametrize("loss, channels", [(GLMambaLoss(), 2), (ContrastiveEdgeLoss(), 1)])
def test_autocast_does_not_change_it(loss, channels):
    truth = images(channels)[1].float()
    output = truth + 1e-3 * torch.randn(truth.shape, generator=torch.Generator().manual_seed(0))
    expected = loss(output, truth)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(output, truth)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_half_precision_output_is_compared_in_float32():
    output, truth = images(2)
    output, truth = output.bfloat16(), truth.float()
    assert GLMambaLoss()(output, truth).item() == pytest.approx(GLMambaLoss()(output.float(), truth).item(), rel=1e-6)


@pytest.mark.parametrize("loss, channels", [(GLMambaLoss(), 2), (ContrastiveEdgeLoss(), 1)])
def test_wrong_shapes_are_named(loss, channels):
    right = torch.rand(2, channels, 8, 9)
    for wrong in (right[:, :, :, :8], torch.rand(2, channels + 1, 8, 9), right[:1]):
        with pytest.raises(ValueError, match=rf"got .*\({wrong.shape[0]}, {wrong.shape[1]}, 8, {wrong.shape[3]}\)"):
            loss(right, wrong)
    with pytest.raises(ValueError, match=f"must both be .B, {channels}, H, W."):
        loss(torch.rand(2, 3, 8, 9), torch.rand(2, 3, 8, 9))
