"""The networks behind the sample files: small, but with every convolution geometry that real ones have."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ConvBN(nn.Module):
    """A convolution and the batch norm behind it."""

    def __init__(self, conv: nn.Module, channels: int) -> None:
        super().__init__()
        self.conv = conv
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve and normalise ``(b, c, h, w)``."""
        return self.bn(self.conv(x))


def conv(inputs: int, outputs: int, kernel: int, **options: object) -> ConvBN:
    """Build a bias-free convolution with its batch norm."""
    return ConvBN(nn.Conv2d(inputs, outputs, kernel, bias=False, **options), outputs)  # type: ignore[arg-type]


class DigitsCNN(nn.Module):
    """A classifier of ``(b, 1, 16, 16)`` digits.

    Affine regions between its ReLUs: a reflect-padded and a circular convolution, a strided one (large enough
    that its spectrum has to be iterated), a depthwise–pointwise pair, a residual sum of one dilated
    convolution and the identity, a sum of two strided branches, a transposed convolution, and an average pool
    into the last Linear.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(1, 8, 3, padding=1, padding_mode="reflect")
        self.mix = conv(8, 8, 3, padding=1, padding_mode="circular")
        self.down = conv(8, 20, 3, stride=2, padding=1)
        self.depthwise = conv(20, 20, 3, padding=1, groups=20)
        self.pointwise = conv(20, 20, 1)
        self.dilated = conv(20, 20, 3, padding=2, dilation=2)
        self.project = conv(20, 24, 3, stride=2, padding=1)
        self.shortcut = conv(20, 24, 1, stride=2)
        self.up = ConvBN(nn.ConvTranspose2d(24, 12, 4, stride=2, padding=1, bias=False), 12)
        self.head = nn.Linear(192, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(b, 10)``."""
        x = torch.relu(self.stem(x))
        x = torch.relu(self.mix(x))
        x = torch.relu(self.down(x))
        x = torch.relu(self.pointwise(self.depthwise(x)))
        x = torch.relu(self.dilated(x) + x)
        x = torch.relu(self.project(x) + self.shortcut(x))
        x = torch.relu(self.up(x))
        return self.head(torch.flatten(F.avg_pool2d(x, 2), 1))


class DigitsMLP(nn.Module):
    """A classifier of ``(b, 64)`` digits; ``fc2`` and ``fc3`` have no activation between them."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(64, 48)
        self.fc2 = nn.Linear(48, 32)
        self.fc3 = nn.Linear(32, 24)
        self.fc4 = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(b, 10)``."""
        x = torch.relu(self.fc1(x))
        x = torch.relu(self.fc3(self.fc2(x)))
        return self.fc4(x)


def digits_sequential() -> nn.Sequential:
    """Build a classifier of ``(b, 1, 16, 16)`` digits out of torch's own modules, nested once."""
    features = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 12, 3, stride=2, padding=1, groups=2),
        nn.BatchNorm2d(12),
        nn.ReLU(),
    )
    head = OrderedDict(
        features=features,
        pool=nn.AvgPool2d(2),
        flat=nn.Flatten(),
        wide=nn.Linear(192, 24),
        drop=nn.Dropout(0.1),
        last=nn.Linear(24, 10),
    )
    return nn.Sequential(head)
