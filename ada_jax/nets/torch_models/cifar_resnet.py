"""He et al.'s ResNets for CIFAR with option A, named as in akamaster/pytorch_resnet_cifar10."""

import torch
from torch import nn
from torch.nn import functional as F


def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """A padded convolution without bias."""
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.stride, self.more = stride, (width - inputs) // 2
        self.conv1, self.bn1 = conv(inputs, width, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width), nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        x = x[:, :, :: self.stride, :: self.stride]
        return F.relu(h + F.pad(x, (0, 0, 0, 0, self.more, self.more)))


class Network(nn.Module):
    """Maps normalised images [B,3,H,W] to logits."""

    def __init__(self, num_classes: int, depth: int):
        super().__init__()
        more = range((depth - 2) // 6 - 1)
        self.conv1, self.bn1 = conv(3, 16), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(Block(16, 16, 1), *(Block(16, 16, 1) for _ in more))
        self.layer2 = nn.Sequential(Block(16, 32, 2), *(Block(32, 32, 1) for _ in more))
        self.layer3 = nn.Sequential(Block(32, 64, 2), *(Block(64, 64, 1) for _ in more))
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))
