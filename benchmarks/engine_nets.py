"""The nets that engine.py measures: those of the CIFAR example, two of them for 224 x 224."""

import torch
import torch.nn.functional as F
from cifar10_nets import NETS, MobileNetV2, ResNet
from torch import Tensor, nn

__all__ = ["net_of"]

CLASSES = 1000


class ImageNetResNet(ResNet):
    """ResNet-18 as in the paper: 7 x 7 with stride 2 and a pooling at the beginning."""

    def __init__(self) -> None:
        super().__init__(CLASSES)
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """``(batch, 3, 224, 224)`` to logits."""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(images))), 3, 2, 1)
        return self.linear(self.blocks(x).mean(dim=(2, 3)))


class ImageNetMobileNetV2(MobileNetV2):
    """MobileNetV2 with the paper's strides."""

    STAGES = tuple(
        (*stage[:3], 2) if index == 1 else stage for index, stage in enumerate(MobileNetV2.STAGES)
    )

    def __init__(self) -> None:
        super().__init__(CLASSES)
        self.conv1[0].stride = (2, 2)


@torch.no_grad()
def net_of(name: str, side: int) -> nn.Module:
    """That net with random weights, and statistics of four random batches, ready to answer."""
    torch.manual_seed(0)
    makers = {"resnet18": ImageNetResNet, "mobilenetv2": ImageNetMobileNetV2}
    net = makers[name]() if name in makers else NETS[name](10)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean of all batches
    for _ in range(4):
        net(torch.randn(8, 3, side, side))
    return net.eval()
