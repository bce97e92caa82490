"""DenseNet and Wide ResNet for 32×32 images, of any legal depth and width.

Both are pre-activation networks: BatchNorm and ReLU come before each convolution. Nothing is done in place,
so that reverse and forward mode, and `torch.func`, pass through them.

A model's name, as the command line takes it, says all that there is to choose::

    densenet-19          DenseNet-BC, depth 19, growth rate 12 (the report's)
    densenet-bc-100-12   DenseNet-BC, depth 100, growth rate 12
    densenet-basic-40    DenseNet without bottlenecks and without compression
    wrn-16-10            Wide ResNet, depth 16, widen factor 10
    wrn-10-2-s2          the same with a stem of stride 2: all feature maps have half the height and width
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from npg.runs.presets import unknown

__all__ = ["KNOWN_MODELS", "DenseNet", "WideResNet", "densenet", "model_from_name", "wide_resnet"]

#: Names with a published or measured result behind them; any legal depth and width beside these is as good.
KNOWN_MODELS = (
    "densenet-19",
    "densenet-bc-100-12",
    "densenet-basic-40-12",
    "wrn-16-1",
    "wrn-16-4",
    "wrn-16-8",
    "wrn-16-10",
    "wrn-28-10",
    "wrn-40-4",
)


def _conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)


def _conv1x1(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False)


def _initialise(model: nn.Module) -> None:
    """He's initialisation, Var[w] = 2 / (k² · channels out), as in both papers; no bias at first."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)


class _Classifier(nn.Module):
    """Convolutional features, normalised, their mean over all places, and one linear layer.

    Args:
        features: images (B, 3, H, W) ↦ (B, channels, h, w), in order.
        channels: of the last of them.
        num_classes: the number of logits.
    """

    def __init__(self, features: list[nn.Module], channels: int, num_classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(*features, nn.BatchNorm2d(channels), nn.ReLU())
        self.classifier = nn.Linear(channels, num_classes)
        _initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to logits (B, num_classes)."""
        logits: Tensor = self.classifier(self.features(images).mean(dim=(2, 3)))
        return logits


class _DenseLayer(nn.Module):
    """x ↦ [x, conv3×3(x)], through a 1×1 bottleneck of 4·growth channels in the BC variant; dropout after each."""

    def __init__(self, in_channels: int, growth_rate: int, bottleneck: bool, dropout: float) -> None:
        super().__init__()
        width = 4 * growth_rate if bottleneck else in_channels
        self.squeeze = (
            nn.Sequential(nn.BatchNorm2d(in_channels), nn.ReLU(), _conv1x1(in_channels, width), nn.Dropout(dropout))
            if bottleneck
            else nn.Identity()
        )
        self.grow = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), _conv3x3(width, growth_rate), nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, self.grow(self.squeeze(x))), dim=1)


class DenseNet(_Classifier):
    """Three dense blocks with two transitions between them; build one with `densenet`.

    Images are (B, 3, H, W), with H and W multiples of 4.
    """

    def __init__(
        self,
        layers_per_block: int,
        growth_rate: int,
        num_classes: int,
        bottleneck: bool,
        compression: float,
        dropout: float,
    ) -> None:
        channels = 2 * growth_rate if bottleneck else 16
        features: list[nn.Module] = [_conv3x3(3, channels)]
        for block in range(3):
            for _ in range(layers_per_block):
                features.append(_DenseLayer(channels, growth_rate, bottleneck, dropout))
                channels += growth_rate
            if block < 2:  # transition
                kept = int(channels * compression)
                features += [nn.BatchNorm2d(channels), nn.ReLU(), _conv1x1(channels, kept)]
                features += [nn.Dropout(dropout), nn.AvgPool2d(2)]
                channels = kept
        super().__init__(features, channels, num_classes)


def densenet(
    depth: int,
    growth_rate: int = 12,
    num_classes: int = 10,
    *,
    bottleneck: bool = True,
    compression: float = 0.5,
    dropout: float = 0.0,
) -> DenseNet:
    """DenseNet: DenseNet-BC by default, the basic one with ``bottleneck=False, compression=1.0``.

    Three blocks share the depth − 4 layers that are neither stem, transition nor classifier: a block has n
    = (depth − 4) / 3 basic layers, or ⌊(depth − 4) / 6⌋ bottlenecks of two convolutions each. The floor is
    the report's reading: where (depth − 4) / 3 is odd, each block goes without its odd half, so that its
    "DenseNet-19" has 16 weight layers and is the network of depth 16.

    Args:
        depth: any depth ≥ 10 (with bottlenecks) or ≥ 7 (without) for which depth − 4 is a multiple of 3.
        growth_rate: the channels k that each layer adds; the stem has 2k with bottlenecks, and 16 without.
        num_classes: the number of logits.
        bottleneck: put a 1×1 convolution to 4k channels before each 3×3 convolution.
        compression: the fraction θ in (0, 1] of the channels that a transition keeps.
        dropout: the probability with which a value is dropped, after each convolution but the first.

    Raises:
        ValueError: an argument is out of its range; for a depth, the nearest legal ones are named.

    Source: Huang, Liu, van der Maaten, Weinberger, "Densely Connected Convolutional Networks", 2017,
    section 3.
    """
    smallest = 10 if bottleneck else 7
    _require_depth("densenet", depth, smallest, step=3)
    _require_positive("growth_rate", growth_rate)
    _require_positive("num_classes", num_classes)
    if not 0.0 < compression <= 1.0:
        raise ValueError(f"compression must be in (0, 1], the fraction of channels kept; got {compression}")
    _require_probability("dropout", dropout)
    layers = (depth - 4) // (6 if bottleneck else 3)
    return DenseNet(layers, growth_rate, num_classes, bottleneck, compression, dropout)


class _WideBlock(nn.Module):
    """x ↦ shortcut(x) + conv3×3(conv3×3(x)); a shortcut with weights follows the first activation."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = _conv3x3(in_channels, out_channels, stride)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = _conv3x3(out_channels, out_channels)
        self.shortcut = (
            None if in_channels == out_channels and stride == 1 else _conv1x1(in_channels, out_channels, stride)
        )

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.norm1(x))
        residual: Tensor = self.conv2(self.dropout(F.relu(self.norm2(self.conv1(activated)))))
        return residual + (x if self.shortcut is None else self.shortcut(activated))


class WideResNet(_Classifier):
    """Three groups of wide residual blocks; build one with `wide_resnet`."""

    def __init__(
        self, blocks_per_group: int, widen_factor: int, num_classes: int, dropout: float, stem_stride: int
    ) -> None:
        features: list[nn.Module] = [_conv3x3(3, 16, stem_stride)]
        channels = 16
        for group, width in enumerate((16, 32, 64)):
            for block in range(blocks_per_group):
                stride = 2 if group > 0 and block == 0 else 1
                features.append(_WideBlock(channels, width * widen_factor, stride, dropout))
                channels = width * widen_factor
        super().__init__(features, channels, num_classes)


def wide_resnet(
    depth: int, widen_factor: int, num_classes: int = 10, *, dropout: float = 0.0, stem_stride: int = 1
) -> WideResNet:
    """Wide ResNet WRN-depth-widen_factor: three groups of (depth − 4) / 6 blocks of two convolutions.

    Args:
        depth: 10, 16, 22, 28, …: depth − 4 is a multiple of 6.
        widen_factor: the groups have 16, 32 and 64 channels, times this.
        num_classes: the number of logits.
        dropout: the probability of dropping a channel's value between a block's two convolutions.
        stem_stride: of the first convolution; 1 in the paper. 2 makes every later layer four times cheaper, for
            machines without a GPU.

    Raises:
        ValueError: an argument is out of its range; for a depth, the nearest legal ones are named.

    Source: Zagoruyko, Komodakis, "Wide Residual Networks", 2016, table 1.
    """
    _require_depth("wide_resnet", depth, 10, step=6)
    _require_positive("widen_factor", widen_factor)
    _require_positive("num_classes", num_classes)
    _require_positive("stem_stride", stem_stride)
    _require_probability("dropout", dropout)
    return WideResNet((depth - 4) // 6, widen_factor, num_classes, dropout, stem_stride)


_DENSENET = re.compile(r"densenet(?:-(bc|basic))?-(\d+)(?:-(\d+))?")
_WIDE_RESNET = re.compile(r"wrn-(\d+)-(\d+)(?:-s(\d+))?")


def model_from_name(name: str, num_classes: int = 10, *, dropout: float = 0.0) -> DenseNet | WideResNet:
    """The model that a name says, such as ``densenet-19``, ``densenet-basic-40-12`` or ``wrn-16-10``.

    Raises:
        ValueError: no such model, with the nearest known names; or an illegal depth, with the nearest legal
            ones.
    """
    if match := _DENSENET.fullmatch(name):
        kind, depth, growth = match.groups()
        bottleneck = kind != "basic"
        return densenet(
            int(depth),
            int(growth or 12),
            num_classes,
            bottleneck=bottleneck,
            compression=0.5 if bottleneck else 1.0,
            dropout=dropout,
        )
    if match := _WIDE_RESNET.fullmatch(name):
        depth, width, stride = match.groups()
        return wide_resnet(int(depth), int(width), num_classes, dropout=dropout, stem_stride=int(stride or 1))
    names = "densenet-DEPTH[-GROWTH], densenet-basic-DEPTH[-GROWTH] and wrn-DEPTH-WIDTH[-sSTRIDE]"
    raise unknown("model", name, KNOWN_MODELS, remedy=f"Names are {names}.")


def _require_depth(what: str, depth: int, smallest: int, step: int) -> None:
    if depth >= smallest and (depth - smallest) % step == 0:
        return
    below = smallest + (max(depth, smallest) - smallest) // step * step
    nearest = f"{smallest}" if depth < smallest else f"{below} and {below + step}"
    raise ValueError(
        f"{what} has no depth {depth}; the nearest legal ones are {nearest} "
        f"(legal: {smallest}, {smallest + step}, {smallest + 2 * step}, …)"
    )


def _require_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be at least 1; got {value}")


def _require_probability(name: str, value: float) -> None:
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must be a probability in [0, 1); got {value}")
