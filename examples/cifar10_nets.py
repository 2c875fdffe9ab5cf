"""The networks of the CIFAR-10 example, in plain torch: nothing in them knows plyweight.

    resnet8     MLPerf Tiny's image classifier                      78,000 parameters
    resnet20    He et al., "Deep Residual Learning for Image        0.27 M; 32, 44 and 56 too
                Recognition" (CVPR 2016), section 4.2
    resnet18    the same paper's ImageNet net, with the 3 x 3       11 M
                first convolution that 32 x 32 images need
    mobilenetv2 Sandler et al. (CVPR 2018), strides for 32 x 32     2.2 M

All take images ``(batch, 3, 32, 32)``, normalized, and give logits ``(batch, num_classes)``.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["FIRST_AND_LAST", "NETS", "CifarResNet", "MobileNetV2", "ResNet", "ResNet8"]


class PadShortcut(nn.Module):
    """Option A of the paper: every second pixel, and zero channels for the missing ones."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.padding = (out_channels - in_channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, in, H, W)`` to ``(batch, out, H / 2, W / 2)``."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))


def conv_shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """Option B: a 1 x 1 convolution."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
    )


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, shortcut: nn.Module):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, in, H, W)`` to ``(batch, out, H / stride, W / stride)``."""
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """``6 * num_blocks + 2`` modules with weights; 16, 32 and 64 channels, option A."""

    def __init__(self, num_blocks: int, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, num_blocks, stride=1)
        self.layer2 = self._stage(16, 32, num_blocks, stride=2)
        self.layer3 = self._stage(32, 64, num_blocks, stride=2)
        self.linear = nn.Linear(64, num_classes)
        start_as_he(self)

    @staticmethod
    def _stage(in_channels: int, out_channels: int, num_blocks: int, *, stride: int) -> nn.Module:
        is_same = in_channels == out_channels
        shortcut = nn.Identity() if is_same else PadShortcut(in_channels, out_channels)
        first = BasicBlock(in_channels, out_channels, stride, shortcut)
        others = [
            BasicBlock(out_channels, out_channels, 1, nn.Identity()) for _ in range(num_blocks - 1)
        ]
        return nn.Sequential(first, *others)

    def forward(self, images: Tensor) -> Tensor:
        """Images to logits."""
        x = F.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean(dim=(2, 3)))


class ResNet8(nn.Module):
    """MLPerf Tiny's ResNet: one block a stage, 1 x 1 shortcuts without a batch norm."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = BasicBlock(16, 16, 1, nn.Identity())
        self.layer2 = BasicBlock(16, 32, 2, nn.Conv2d(16, 32, 1, 2, bias=False))
        self.layer3 = BasicBlock(32, 64, 2, nn.Conv2d(32, 64, 1, 2, bias=False))
        self.linear = nn.Linear(64, num_classes)
        start_as_he(self)

    def forward(self, images: Tensor) -> Tensor:
        """Images to logits."""
        x = F.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean(dim=(2, 3)))


class ResNet(nn.Module):
    """ResNet-18 for 32 x 32 images: a 3 x 3 first convolution and no pooling after it."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        stages, in_channels = [], 64
        for out_channels, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
            is_same = in_channels == out_channels
            shortcut = nn.Identity() if is_same else conv_shortcut(in_channels, out_channels, 2)
            stages.append(BasicBlock(in_channels, out_channels, stride, shortcut))
            stages.append(BasicBlock(out_channels, out_channels, 1, nn.Identity()))
            in_channels = out_channels
        self.blocks = nn.Sequential(*stages)
        self.linear = nn.Linear(512, num_classes)
        start_as_he(self)

    def forward(self, images: Tensor) -> Tensor:
        """Images to logits."""
        x = self.blocks(F.relu(self.bn1(self.conv1(images))))
        return self.linear(x.mean(dim=(2, 3)))


class InvertedResidual(nn.Module):
    """Widen by 1 x 1, convolve each channel by 3 x 3, narrow by 1 x 1 without activation."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.has_shortcut = stride == 1 and in_channels == out_channels
        widen = conv_bn_relu6(in_channels, hidden, 1) if expansion > 1 else nn.Identity()
        self.block = nn.Sequential(
            widen,
            conv_bn_relu6(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, in, H, W)`` to ``(batch, out, H / stride, W / stride)``."""
        return x + self.block(x) if self.has_shortcut else self.block(x)


class MobileNetV2(nn.Module):
    """The paper's seven stages; the first two strides are 1, for images of 32 x 32."""

    # expansion, channels, blocks, stride
    STAGES = (
        (1, 16, 1, 1),
        (6, 24, 2, 1),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = conv_bn_relu6(3, 32, 3)
        blocks, in_channels = [], 32
        for expansion, out_channels, num_blocks, stride in self.STAGES:
            for index in range(num_blocks):
                block_stride = stride if index == 0 else 1
                blocks.append(InvertedResidual(in_channels, out_channels, block_stride, expansion))
                in_channels = out_channels
        self.blocks = nn.Sequential(*blocks)
        self.conv2 = conv_bn_relu6(in_channels, 1280, 1)
        self.linear = nn.Linear(1280, num_classes)
        start_as_he(self)

    def forward(self, images: Tensor) -> Tensor:
        """Images to logits."""
        x = self.conv2(self.blocks(self.conv1(images)))
        return self.linear(x.mean(dim=(2, 3)))


def conv_bn_relu6(
    in_channels: int, out_channels: int, size: int, stride: int = 1, groups: int = 1
) -> nn.Module:
    """A convolution, its batch norm, and a ReLU that ends at 6."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, size, stride, size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU6(),
    )


@torch.no_grad()
def start_as_he(net: nn.Module) -> None:
    """The initialization of He et al. (ICCV 2015) for every convolution."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


NETS: dict[str, Callable[[int], nn.Module]] = {
    "resnet8": ResNet8,
    "resnet20": lambda num_classes=10: CifarResNet(3, num_classes),
    "resnet32": lambda num_classes=10: CifarResNet(5, num_classes),
    "resnet44": lambda num_classes=10: CifarResNet(7, num_classes),
    "resnet56": lambda num_classes=10: CifarResNet(9, num_classes),
    "resnet18": ResNet,
    "mobilenetv2": MobileNetV2,
}
# The modules that recipes pin to 8 bits, in every one of these nets.
FIRST_AND_LAST = ("conv1", "linear")
