"""ada_jax's network with nine layers."""

import torch
from torch import nn
from torch.nn import functional as F


def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """A padded convolution without bias."""
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)


class Stage(nn.Module):
    """A convolution of stride 2, then two with a shortcut around them."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.down, self.down_bn = conv(inputs, width, 2), nn.BatchNorm2d(width)
        self.conv1, self.bn1 = conv(width, width), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width), nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.down_bn(self.down(x)))
        h = F.relu(self.bn1(self.conv1(x)))
        return x + F.relu(self.bn2(self.conv2(h)))


class Network(nn.Module):
    """Maps normalised images [B,3,H,W] to logits."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.conv1, self.bn1 = conv(3, 16), nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = Stage(16, 32), Stage(32, 64), Stage(64, 128)
        self.linear = nn.Linear(128, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))
