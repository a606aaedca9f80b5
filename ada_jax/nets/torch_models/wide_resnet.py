"""WideResNets without dropout, named as in TRADES and RobustBench."""

import torch
from torch import nn
from torch.nn import functional as F


def conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    """A padded convolution without bias."""
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv(inputs, width, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), conv(width, width, 3)
        self.convShortcut = None if inputs == width else conv(inputs, width, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pre = F.relu(self.bn1(x))
        h = self.conv2(F.relu(self.bn2(self.conv1(pre))))
        return h + (x if self.convShortcut is None else self.convShortcut(pre))


class Stage(nn.Module):
    """Blocks of one width, the first with a stride."""

    def __init__(self, inputs: int, width: int, stride: int, blocks: int):
        super().__init__()
        more = (Block(width, width, 1) for _ in range(blocks - 1))
        self.layer = nn.Sequential(Block(inputs, width, stride), *more)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


class Network(nn.Module):
    """Maps normalised images [B,3,H,W] to logits."""

    def __init__(self, num_classes: int, depth: int, factor: int):
        super().__init__()
        width, blocks = 16 * factor, (depth - 4) // 6
        self.conv1 = conv(3, 16, 3)
        self.block1 = Stage(16, width, 1, blocks)
        self.block2 = Stage(width, 2 * width, 2, blocks)
        self.block3 = Stage(2 * width, 4 * width, 2, blocks)
        self.bn1, self.fc = nn.BatchNorm2d(4 * width), nn.Linear(4 * width, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(F.relu(self.bn1(x)).mean((2, 3)))
