"""GLMamba, in the paper's order: SS2D, Mamba block, deform block, modulator, fusion, network.

Source: Ji, Zou, Kui, Thureau, Ruan, "Global and Local Mamba Network for Multi-Modality Medical Image
Super-Resolution". Where the paper leaves something open, the comment says "our choice".

Symbols: ``B`` batch, ``C`` channels of the network, ``D = 2C`` channels inside a Mamba block, ``K = 4`` scan
directions, ``N`` states of the scan, ``L`` tokens of a scan, ``R`` rank of the step-size projection.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from glmamba_monai.ops import (
    attend_channels,
    bias_silu,
    deform_residual,
    fuse_modalities,
    modulate,
    norm_gate,
    pixels_in_place,
    projected_ss2d_scan,
    side_by_side,
)

K = 4  # left to right, top to bottom, and both reversed
EXPANSION = 2  # D = 2C


class SS2D(nn.Module):
    """Four-direction selective scan of a feature map (paper Fig. 2A, eqs 1-4).

    Every direction reads the map as one sequence, with its own projections; the four results are put back in
    place and summed.

    Args:
        channels: ``D``, channels of the map.
        d_state: ``N``, states per channel.
        dt_rank: ``R``, rank of the projection that yields the step sizes.
        local: scan each of the four quadrants of the map on its own (the reference branch) instead of the whole
            map (the low-resolution branch). The quadrants share the weights (our choice).
    """

    def __init__(self, channels: int, d_state: int, dt_rank: int, local: bool) -> None:
        super().__init__()
        self.d_state = d_state
        self.dt_rank = dt_rank
        self.local = local
        self.x_proj = nn.Parameter(torch.empty(K, dt_rank + 2 * d_state, channels))
        self.dt_proj = nn.Parameter(torch.empty(K, channels, dt_rank))
        self.dt_bias = nn.Parameter(torch.empty(K * channels))
        self.A_log = nn.Parameter(torch.empty(K * channels, d_state))
        self.D = nn.Parameter(torch.ones(K * channels))
        self._initialise()

    def _initialise(self) -> None:
        """Mamba's initialisation: A = -1..-N, step sizes log-uniform in [1e-3, 1e-1] (docs/method.md)."""
        channels = self.dt_proj.shape[1]
        nn.init.uniform_(self.x_proj, -(channels**-0.5), channels**-0.5)
        nn.init.uniform_(self.dt_proj, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        with torch.no_grad():
            dt = torch.exp(torch.empty_like(self.dt_bias).uniform_(math.log(1e-3), math.log(1e-1)))
            self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
            self.A_log.copy_(torch.log(torch.arange(1, self.d_state + 1, dtype=dt.dtype)).expand_as(self.A_log))

    def forward(self, x: Tensor) -> Tensor:
        """Scan ``(B, H, W, D)``, H and W even if local; returns the same shape, in float32."""
        # One product for all directions: what a position contributes does not depend on when it is visited.
        rows = F.linear(x, self.x_proj.flatten(0, 1)).unflatten(-1, self.x_proj.shape[:2])
        dt, b, c = torch.split(rows, [self.dt_rank, self.d_state, self.d_state], dim=4)  # (B, H, W, K, R | N | N)
        return projected_ss2d_scan(
            x,
            dt,
            self.dt_proj,
            -torch.exp(self.A_log).view(-1, x.shape[3], self.d_state),
            b,
            c,
            self.D.view(-1, x.shape[3]),
            self.dt_bias.view(-1, x.shape[3]),
            self.local,
        )

    def projection_macs(self, tokens: int) -> int:
        """Multiply-adds of the projections (raw parameters, which module counters do not see)."""
        return tokens * (self.x_proj.numel() + self.dt_proj.numel())

    def scan_flops(self, tokens: int) -> int:
        """Operations of the scan itself: 9 per state and token (the usual count for Mamba), 1 for the D term."""
        return tokens * (9 * self.A_log.numel() + self.D.numel())


class LateBiasConv2d(nn.Conv2d):
    """A 3x3 convolution that on a GPU leaves its bias to the step after it.

    cuDNN would add it in a pass of its own over the whole result; oneDNN, on a CPU, adds it to its sums.
    """

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__(channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """``(B, C, H, W)`` to ``(B, C', H, W)``, and the bias if it is still to be added."""
        bias = self.bias
        assert bias is not None  # tells TorchScript the type
        return self._convolve(x, self.weight, bias)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor | None]:
        """With a weight that may have outputs beyond the bias, which get none."""
        if self._bias_is_late(x):
            return F.conv2d(x, weight, None, self.stride, self.padding, self.dilation, self.groups), bias
        bias = F.pad(bias, [0, weight.shape[0] - bias.shape[0]])
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups), None

    def _bias_is_late(self, x: Tensor) -> bool:
        return x.is_cuda


class ChannelAttention(nn.Module):
    """Residual block, maps weighted by channel: global average pool, 1x1, ReLU, 1x1, sigmoid (paper Fig. 2A, "CA")."""

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, channels // reduction, 1)
        self.excite = nn.Conv2d(channels // reduction, channels, 1)

    def forward(self, x: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
        """``x + CA(z) z`` of ``z = y + bias``, for maps ``(B, H, W, C)``."""
        squeeze_bias, excite_bias = self.squeeze.bias, self.excite.bias
        assert squeeze_bias is not None and excite_bias is not None  # tells TorchScript the type
        squeeze, excite = self.squeeze.weight.flatten(1), self.excite.weight.flatten(1)
        return attend_channels(x, y, bias, squeeze, squeeze_bias, excite, excite_bias)

    def layer_macs(self, images: int) -> int:
        """Multiply-adds of the two layers, which run inside an operator (module counters do not see them)."""
        return images * (self.squeeze.weight.numel() + self.excite.weight.numel())


class DepthwiseSiLU(nn.Conv2d):
    """SiLU of a 3x3 convolution of each channel, channels last."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, D)`` to the same shape."""
        y = F.conv2d(x.permute(0, 3, 1, 2), self.weight, None, self.stride, self.padding, self.dilation, self.groups)
        bias = self.bias
        assert bias is not None  # tells TorchScript the type
        return bias_silu(y.permute(0, 2, 3, 1), bias)


class Mix(nn.Sequential):
    """Conv3x3 (C to M), GELU, Conv3x3 (M to C)."""

    def __init__(self, channels: int, mix_channels: int) -> None:
        super().__init__(
            nn.Conv2d(channels, mix_channels, 3, padding=1), nn.GELU(), LateBiasConv2d(mix_channels, channels)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """``(B, H, W, C)`` to the same shape, and the last bias if it is still to be added."""
        y, bias = self[2](self[1](self[0](x.permute(0, 3, 1, 2))))
        return y.permute(0, 2, 3, 1), bias


class NoMix(nn.Module):
    """What stands in the place of :class:`Mix` in a block without one."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The map as it is; no bias."""
        return x, None


class MambaBlock(nn.Module):
    """Mamba block (paper Fig. 2A): ``x + CA(mix(Linear(SiLU(Linear(h)) * LN(SS2D(u)))))`` with ``h = LN(x)``.

    Args:
        channels: ``C``.
        d_state: states of the scan.
        local: scan quadrants instead of the whole map.
        attention_reduction: reduction of the channel attention.
        mix_channels: width of a pair of 3x3 convolutions before the attention; 0 leaves the pair out (our choice).
    """

    def __init__(self, channels: int, d_state: int, local: bool, attention_reduction: int, mix_channels: int) -> None:
        super().__init__()
        inner = EXPANSION * channels
        self.norm = nn.LayerNorm(channels)
        self.to_gate = nn.Linear(channels, inner, bias=False)
        self.to_scan = nn.Linear(channels, inner, bias=False)
        self.depthwise = DepthwiseSiLU(inner)
        self.ss2d = SS2D(inner, d_state, math.ceil(channels / 16), local)
        self.scan_norm = nn.LayerNorm(inner)
        self.to_out = nn.Linear(inner, channels, bias=False)
        self.mix = Mix(channels, mix_channels) if mix_channels else NoMix()
        self.attention = ChannelAttention(channels, attention_reduction)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, C)`` to the same shape."""
        h = norm_gate(x, self.norm.weight, self.norm.bias)
        # The depthwise convolution sees the whole map; only the scan is cut into quadrants.
        u = self.ss2d(self._recomputed_scan_input(h))
        y = self.to_out(norm_gate(u, self.scan_norm.weight, self.scan_norm.bias, self.to_gate(h)))
        y, bias = self.mix(y)
        return self.attention(x, y, bias)

    def _scan_input(self, h: Tensor) -> Tensor:
        return self.depthwise(self.to_scan(h))

    def _recomputed_scan_input(self, h: Tensor) -> Tensor:
        """``_scan_input``; a training step computes it again instead of keeping its two maps (docs/performance.md)."""
        if not torch.jit.is_scripting() and self.training and torch.is_grad_enabled():
            # Nothing is drawn at random; the generator's state could not be read while a CUDA graph is captured.
            return checkpoint(self._scan_input, h, use_reentrant=False, preserve_rng_state=False)
        return self._scan_input(h)


class OffsetsAndMask(LateBiasConv2d):
    """3x3 convolution for the 18 offsets and the logits of 9 masks of a deformable convolution; zero at the start.

    One convolution reads the map once. It has 5 unused outputs, made of zeros, since cuDNN is slow with 27.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, 18 + 9)
        nn.init.zeros_(self.weight)
        bias = self.bias
        assert bias is not None
        nn.init.zeros_(bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """``(B, C, H, W)`` to ``(B, 18 + 9 + 5, H, W)``, and the bias of the 27 if it is still to be added."""
        bias = self.bias
        assert bias is not None  # tells TorchScript the type
        weight = F.pad(self.weight, [0, 0, 0, 0, 0, 0, 0, 5])
        return self._convolve(x, weight, bias)


class DeformBlock(nn.Module):
    """Residual modulated deformable 3x3 convolution (paper Fig. 2B, eq. 5).

    Offsets and masks start at zero, so the block starts as a plain convolution at half weight. Residual and
    activation around it are our choice.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.offsets_and_mask = OffsetsAndMask(channels)
        self.weight = nn.Parameter(torch.empty(channels, channels, 3, 3))
        self.bias = nn.Parameter(torch.zeros(channels))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))  # as nn.Conv2d

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to the same shape."""
        predicted, bias = self.offsets_and_mask(x)
        return deform_residual(x, predicted, self.weight, self.bias, bias)

    def product_macs(self, pixels: int) -> int:
        """Multiply-adds of the weights with the samples (raw parameters, which module counters do not see)."""
        return pixels * self.weight.numel()


class PatchesToPixels(nn.Linear):
    """The four pixels of each 2x2 patch, by a learned 1x1 product C to 4C (what PixelShuffle then puts in place)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, 4 * channels, bias=False)  # a bias would only add a constant 2x2 pattern

    def forward(self, tokens: Tensor) -> Tensor:
        """``(B, H/2, W/2, C)`` to ``(B, H/2, W/2, 2, 2, C)``."""
        return F.linear(tokens, self.weight).unflatten(-1, [2, 2, tokens.shape[-1]])


class BilinearPixels(nn.Module):
    """The pixels of 2x2 patches by bilinear interpolation."""

    def forward(self, tokens: Tensor) -> Tensor:
        """``(B, H/2, W/2, C)`` to ``(B, H, W, C)``."""
        up = F.interpolate(tokens.permute(0, 3, 1, 2), scale_factor=2.0, mode="bilinear", align_corners=False)
        return up.permute(0, 2, 3, 1)


class Branch(nn.Module):
    """Features of one image (paper Fig. 1): convolution, Mamba path at half resolution, deform path, modulator.

    Args:
        images: how many images it sees, as channels of its input.
        local: local (quadrant) instead of global scans.
        modulator: add the deform path and modulate the Mamba features by it (Fig. 2C); else Mamba features alone.

    The other arguments are those of :class:`GLMamba`.
    """

    def __init__(
        self,
        images: int,
        channels: int,
        n_mamba: int,
        n_deform: int,
        d_state: int,
        attention_reduction: int,
        mix_channels: int,
        unembedding: str,
        local: bool,
        modulator: bool,
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(images, channels, 3, padding=1)
        self.embed = nn.Conv2d(channels, channels, 2, stride=2)
        self.mamba = nn.Sequential(
            *(MambaBlock(channels, d_state, local, attention_reduction, mix_channels) for _ in range(n_mamba))
        )
        self.unembed = PatchesToPixels(channels) if unembedding == "pixel_shuffle" else BilinearPixels()
        self.modulator = modulator
        self.deform = nn.Sequential(*(DeformBlock(channels) for _ in range(n_deform if modulator else 0)))

    def forward(self, image: Tensor) -> Tensor:
        """Features ``(B, C, H, W)`` of ``(B, images, H, W)``, H and W multiples of 4."""
        # Channels last in memory: what the scan, the deformable convolution and linear layers read in one piece.
        features = self.stem(image).contiguous(memory_format=torch.channels_last)
        mamba = self.unembed(self.mamba(self.embed(features).permute(0, 2, 3, 1)))
        if not self.modulator:
            return pixels_in_place(mamba).permute(0, 3, 1, 2)
        deform = self.deform(features).permute(0, 2, 3, 1)
        return modulate(deform, mamba).permute(0, 3, 1, 2)


class AddFusion(nn.Module):
    """Sum of the two feature maps and a 3x3 convolution (the ablation rows without the fusion block)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, low_resolution: Tensor, reference: Tensor) -> Tensor:
        """Two maps ``(B, C, H, W)`` to one."""
        return self.conv(low_resolution + reference)


class MultiModalityFusion(nn.Module):
    """Difference, similarity and complement of the two feature maps, weighted per image (paper eqs 6-11)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.complement_weights = nn.Conv2d(2 * channels, 2, 1)
        self.mixture_weights = nn.Linear(3 * channels, 3)

    def forward(self, low_resolution: Tensor, reference: Tensor) -> Tensor:
        """Two maps ``(B, C, H, W)`` to one."""
        bias = self.complement_weights.bias
        assert bias is not None  # tells TorchScript the type
        fused = fuse_modalities(
            low_resolution.permute(0, 2, 3, 1),
            reference.permute(0, 2, 3, 1),
            self.complement_weights.weight.flatten(1),
            bias,
            self.mixture_weights.weight,
            self.mixture_weights.bias,
        )
        return fused.permute(0, 3, 1, 2)

    def layer_macs(self, images: int, pixels: int) -> int:
        """Multiply-adds of the two layers, which run inside an operator (module counters do not see them)."""
        return pixels * self.complement_weights.weight.numel() + images * self.mixture_weights.weight.numel()


class ScaledConv2d(nn.Conv2d):
    """A 3x3 convolution whose weights and biases are multiplied by numbers."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__(channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor, weight_scale: Tensor, bias_scale: Tensor) -> Tensor:
        """``(B, C, H, W)`` to ``(B, C', H, W)``; two scalars."""
        bias = self.bias
        assert bias is not None  # tells TorchScript the type
        weight = weight_scale * self.weight
        return F.conv2d(x, weight, bias_scale * bias, self.stride, self.padding, self.dilation, self.groups)


class ReconstructionHead(nn.Sequential):
    """Conv3x3 (C to C), GELU, Conv3x3 (C to 1) (our choice; what became of a ReLU there: docs/training.md).

    The activation is GELU(s x) / s. The buffer s, ``sharpness``, is 1 in a new network. Weights that were trained with
    a ReLU have a large one in their file, with which the two are the same; it is multiplied into the convolutions'
    weights, so it costs nothing.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(ScaledConv2d(channels, channels), nn.GELU(), ScaledConv2d(channels, 1))
        self.register_buffer("sharpness", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to ``(B, 1, H, W)``."""
        y = self[0](x, self.sharpness, self.sharpness)
        if not torch.jit.is_scripting() and self.training and torch.is_grad_enabled():
            # One map fewer to keep at the moment when the most are kept; the two steps are cheap.
            return checkpoint(self._image, y, use_reentrant=False, preserve_rng_state=False)
        return self._image(y)

    def _image(self, y: Tensor) -> Tensor:
        return self[2](self[1](y), 1 / self.sharpness, torch.ones_like(self.sharpness))


class GLMamba(nn.Module):
    """GLMamba: super-resolution of a slice of one contrast with a sharp slice of another (paper Fig. 1).

    One tensor in, one tensor out: ``x`` is ``(B, 2, H, W)``, channel 0 the low-resolution slice upsampled onto the
    reference's grid (upsampling has no weights, so it is a transform: see
    :class:`glmamba_monai.transforms.KSpaceUpsample`), channel 1 the reference. The result is ``(B, 2, H, W)``:
    the super-resolved slice and the reconstruction of the reference. Any H, W >= 8.

    The defaults are the preset ``glmamba``; the other presets and the rows of the paper's Table 1 are registered
    in :data:`glmamba_monai.networks.NETWORKS`.

    Args:
        channels: ``C``, features of every map.
        n_mamba: Mamba blocks per branch.
        n_deform: deform blocks per branch.
        d_state: states of the selective scan.
        attention_reduction: reduction of the channel attention in the Mamba blocks.
        mix_channels: width of the 3x3 convolution pair in the Mamba blocks; 0 for none.
        unembedding: from half to full resolution, "pixel_shuffle" (learned) or "bilinear".
        lr_scan: scan of the low-resolution branch, "global" or "local".
        ref_scan: scan of the reference branch, "local" or "global"; None for no reference branch (then channel 1
            is returned as it came).
        modulator: deform blocks and modulator in each branch.
        fusion: "adaptive" (the paper's fusion block) or "add" (sum and 3x3 convolution).
        guided: the low-resolution branch sees the reference, too, as a second channel of its first convolution (our
            choice, docs/method.md), instead of the low-resolution slice alone (the paper's layout, where the two
            meet in the fusion block). Without a reference branch it sees the low-resolution slice alone.

    Raises:
        ValueError: an argument has an unknown value, or the input is not ``(B, 2, H, W)`` with H, W >= 8.
    """

    def __init__(
        self,
        channels: int = 96,
        n_mamba: int = 4,
        n_deform: int = 4,
        d_state: int = 16,
        attention_reduction: int = 30,
        mix_channels: int = 16,
        unembedding: str = "pixel_shuffle",
        lr_scan: str = "global",
        ref_scan: str | None = "local",
        modulator: bool = True,
        fusion: str = "adaptive",
        guided: bool = True,
    ) -> None:
        super().__init__()
        _check_choice("unembedding", unembedding, ("pixel_shuffle", "bilinear"))
        _check_choice("lr_scan", lr_scan, ("global", "local"))
        _check_choice("ref_scan", ref_scan, ("global", "local", None))
        _check_choice("fusion", fusion, ("adaptive", "add"))
        if not 1 <= attention_reduction <= channels:
            raise ValueError(
                f"attention_reduction must lie between 1 and channels ({channels}), got {attention_reduction}"
            )
        shape = (channels, n_mamba, n_deform, d_state, attention_reduction, mix_channels, unembedding)
        self.guided = guided and ref_scan is not None
        self.lr_branch = Branch(1 + self.guided, *shape, local=lr_scan == "local", modulator=modulator)
        self.lr_head = ReconstructionHead(channels)
        # The network starts as zero-filling and learns what that lacks.
        nn.init.zeros_(self.lr_head[-1].weight)
        nn.init.zeros_(self.lr_head[-1].bias)
        self.ref_branch: Branch | None = None
        self.ref_head: nn.Module | None = None
        self.fusion: nn.Module | None = None
        if ref_scan is not None:
            self.ref_branch = Branch(1, *shape, local=ref_scan == "local", modulator=modulator)
            self.ref_head = ReconstructionHead(channels)
            self.fusion = MultiModalityFusion(channels) if fusion == "adaptive" else AddFusion(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Super-resolve ``(B, 2, H, W)``: channel 0 the upsampled low-resolution slice, channel 1 the reference."""
        if x.dim() != 4 or x.shape[1] != 2 or x.shape[2] < 8 or x.shape[3] < 8:
            raise ValueError(f"x must be (B, 2, H, W) with H, W >= 8, got {list(x.shape)}")
        height, width = x.shape[2], x.shape[3]
        # Multiples of 4: 2x2 patches, and 2x2 quadrants of patches.
        x = F.pad(x, [0, -width % 4, 0, -height % 4], mode="reflect")
        # Channels last from here on: cuDNN's first convolutions are slow otherwise, and their results want a copy.
        x = x.contiguous(memory_format=torch.channels_last)
        upsampled, reference = x[:, 0:1], x[:, 1:2]
        seen = x if self.guided else upsampled
        if self.ref_branch is not None and self.ref_head is not None and self.fusion is not None:
            if torch.jit.is_scripting():
                features, ref_features = self.lr_branch(seen), self.ref_branch(reference)
            else:
                features, ref_features = side_by_side(self.lr_branch, seen, self.ref_branch, reference)
            features = self.fusion(features, ref_features)
            reconstruction = self.ref_head(ref_features)
        else:
            features = self.lr_branch(seen)
            reconstruction = reference
        output = torch.cat((upsampled + self.lr_head(features), reconstruction.to(x.dtype)), dim=1)
        return output[:, :, :height, :width]


def _check_choice(name: str, value: str | None, choices: tuple[str | None, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
