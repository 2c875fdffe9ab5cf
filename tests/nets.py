"""Networks that tests train, pack and load."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plyweight.nn import prepare
from plyweight.nn.layered import LayeredModule
from plyweight.train import JointObjective, recalibrate

ALL_BIT_WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8)


class ConvNet(nn.Module):
    """What a small vision model consists of; 3 channels of 8 x 8 to 5 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 7, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(7)
        self.fc = nn.Linear(7 * 16, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(images)))
        x = F.max_pool2d(F.relu(self.bn2(self.conv2(x))), 2)
        return self.fc(x.flatten(start_dim=1))


class ZooNet(nn.Module):
    """Convolutions of every kind, an embedding tied to the head, norms, attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, padding_mode="circular")
        self.grouped = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2)
        self.conv1d = nn.Conv1d(8, 8, 3, padding=1)
        self.bn1d = nn.BatchNorm1d(8)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, activation="gelu", batch_first=True),
            1,
        )
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 12)
        self.head.weight = self.embedding.weight
        self.register_buffer("positions", torch.arange(12), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(images)))
        for _ in range(2):
            x = F.relu(self.depthwise(x))
        x = F.relu(self.grouped(x)).flatten(start_dim=2)
        x = self.bn1d(self.conv1d(x)).transpose(1, 2)[:, :12]
        x = self.encoder(x + self.embedding(self.positions))
        return self.head(self.norm(x.mean(dim=1)))


def with_rows(model: nn.Module) -> nn.Module:
    """``model`` with a bias for each bit-width and a gain for each channel, as calibrated."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LayeredModule) and module.bias is not None:
                rows = module.give_bias_rows()
                rows += torch.randn(rows.shape, generator=generator) / 4
                quantizer = module.weight_quantizer
                shape = len(quantizer.own_bit_widths), *quantizer.clip.shape
                gain = 1 + torch.rand(shape, generator=generator) / 4
                quantizer.gain = nn.Parameter(gain)
    return model


def batch(num_classes: int = 5) -> tuple[Tensor, Tensor]:
    """Eight images ``(8, 3, 8, 8)`` and their labels, always the same."""
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(8, 3, 8, 8, generator=generator)
    return images, torch.randint(0, num_classes, (8,), generator=generator)


def trained(net: nn.Module, bit_widths: tuple[int, ...] = ALL_BIT_WIDTHS, **options) -> nn.Module:
    """``net`` prepared and trained for a few steps, in evaluation mode."""
    model = prepare(net, bit_widths, **options)
    objective = JointObjective(model, F.cross_entropy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    images, labels = batch()
    for _ in range(2):
        objective.backward(images, labels)
        optimizer.step()
        optimizer.zero_grad()
    recalibrate(model, [images])
    return model.eval()
