"""Networks whose graphs are tested, with batch norms that matter."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plyweight.nn import prepare


class Block(nn.Module):
    """Two convolutions beside a shortcut, as in a ResNet."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        is_same = in_channels == out_channels
        self.shortcut = (
            nn.Identity() if is_same else nn.Conv2d(in_channels, out_channels, 1, stride)
        )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class SmallResNet(nn.Module):
    """``(batch, 3, 16, 16)`` to 5 classes; a pooling, both kinds of shortcut, and zero channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.block1 = Block(8, 8, 1)
        self.block2 = Block(8, 16, 2)
        self.linear = nn.Linear(16, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(images))), 2)
        return self.linear(self.block2(self.block1(x)).mean(dim=(2, 3)))


class PaddedResNet(SmallResNet):
    """The shortcut of the CIFAR paper: every second pixel, and zero channels."""

    def __init__(self) -> None:
        super().__init__()
        self.block2.shortcut = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        x = self.block1(F.relu(self.bn1(self.conv1(images))))
        block = self.block2
        out = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        return self.linear(F.relu(out + shortcut).mean(dim=(2, 3)))


class SmallMobileNet(nn.Module):
    """Depthwise convolutions, ReLU6, a shortcut between narrow ends; to 5 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = self._unit(3, 8, 3)
        self.widen = self._unit(8, 24, 1)
        self.depthwise = self._unit(24, 24, 3, groups=24)
        self.narrow = nn.Conv2d(24, 8, 1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.head = self._unit(8, 12, 1)
        self.linear = nn.Linear(12, 5)

    @staticmethod
    def _unit(in_channels: int, out_channels: int, size: int, groups: int = 1) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(in_channels, out_channels, size, 1, size // 2, groups=groups, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU6(),
        )

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for _ in range(2):
            x = x + self.bn(self.narrow(self.depthwise(self.widen(x))))
        return self.linear(self.head(x).mean(dim=(2, 3)))


class Fire(nn.Module):
    """SqueezeNet's module: narrow, then two convolutions side by side."""

    def __init__(self, in_channels: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(in_channels, squeezed, 1)
        self.expand1 = nn.Conv2d(squeezed, expanded, 1)
        self.expand3 = nn.Conv2d(squeezed, expanded, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.expand1(x)), F.relu(self.expand3(x))], dim=1)


class SmallSqueezeNet(nn.Module):
    """Fire modules, poolings between them, and classes that are channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.fire1, self.fire2 = Fire(8, 4, 8), Fire(16, 4, 8)
        self.classes = nn.Conv2d(16, 5, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv(images)), 3, 2, ceil_mode=True)
        x = F.max_pool2d(self.fire1(x), 3, 2, ceil_mode=True)
        x = F.relu(self.classes(self.fire2(x)))
        return F.adaptive_avg_pool2d(x, 1).flatten(start_dim=1)


class SmallTransformer(nn.Module):
    """Tokens ``(batch, 7)`` to logits ``(batch, 7, 12)``, the head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.positions = nn.Parameter(torch.randn(7, 8))
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=True), 1
        )
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.encoder(self.embedding(tokens) + self.positions)))


def lively(net: nn.Module, *, seed: int = 0) -> nn.Module:
    """``net`` with batch norms as training might leave them, some of their gammas negative."""
    generator = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            if module.affine:
                with torch.no_grad():
                    module.weight.normal_(0, 1, generator=generator)
                    module.bias.normal_(0, 0.2, generator=generator)
    return net


def prepared(net: nn.Module, inputs: Tensor, bit_widths=(2, 3, 4, 8), **options) -> nn.Module:
    """A layered copy of ``net`` whose activation quantizers have seen ``inputs``."""
    model = prepare(lively(net), bit_widths, **options).eval()
    with torch.no_grad():
        model(inputs)
    return model
