"""Pre-activation ResNets for small images, named as in Wong et al.'s code and RobustBench."""

import torch
from torch import nn
from torch.nn import functional as F


def conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    """A padded convolution without bias."""
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)


class Block(nn.Module):
    """v2: the shortcut projects the pre-activated input, as bottlenecks always do."""

    def __init__(self, inputs: int, width: int, stride: int, bottleneck: bool, v2: bool):
        super().__init__()
        self.bottleneck, self.v2 = bottleneck, v2 or bottleneck
        outputs = 4 * width if bottleneck else width
        first = (1, 1) if bottleneck else (3, stride)
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv(inputs, width, *first)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3, stride if bottleneck else 1)
        if bottleneck:
            self.bn3, self.conv3 = nn.BatchNorm2d(width), conv(width, outputs, 1)
        self.projects = stride != 1 or inputs != outputs
        if self.projects:
            self.shortcut = nn.Sequential(conv(inputs, outputs, 1, stride))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pre = F.relu(self.bn1(x))
        h = self.conv2(F.relu(self.bn2(self.conv1(pre))))
        if self.bottleneck:
            h = self.conv3(F.relu(self.bn3(h)))
        return h + (self.shortcut(pre if self.v2 else x) if self.projects else x)


class Network(nn.Module):
    """Maps normalised images [B,3,H,W] to logits."""

    def __init__(self, num_classes: int, widths, depths, bottleneck=False, v2=False, last_bn=True):
        super().__init__()
        self.conv1, channels = conv(3, widths[0], 3), widths[0]
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True), 1):
            blocks = []
            for i in range(depth):
                stride = 2 if stage > 1 and i == 0 else 1
                blocks.append(Block(channels, width, stride, bottleneck, v2))
                channels = 4 * width if bottleneck else width
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        if last_bn:
            self.bn = nn.BatchNorm2d(channels)
        self.last_bn, self.stages = last_bn, len(widths)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv1(x)
        for stage in range(1, self.stages + 1):
            x = getattr(self, f"layer{stage}")(x)
        x = F.relu(self.bn(x)) if self.last_bn else x
        return self.linear(x.mean((2, 3)))
