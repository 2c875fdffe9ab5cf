"""SqueezeNet 1.1 and its pictures, in plain torch: nothing in it knows plyweight.

Iandola et al., "SqueezeNet: AlexNet-level accuracy with 50x fewer parameters" (arXiv 1602.07360).
No batch norm anywhere: every convolution has a bias, which is what makes it a test of calibration.
Names of parameters are torchvision's.
"""

import csv
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["PICTURE_SIZE", "SqueezeNet", "read_pictures"]

PICTURE_SIZE = 227
MEAN = torch.tensor((123.0, 117.0, 104.0)).view(3, 1, 1)  # of red, green, blue, 0 to 255


class Fire(nn.Module):
    """Squeeze to few channels by 1 x 1, then expand by 1 x 1 and 3 x 3 side by side."""

    def __init__(self, in_channels: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(in_channels, squeezed, 1)
        self.expand1x1 = nn.Conv2d(squeezed, expanded, 1)
        self.expand3x3 = nn.Conv2d(squeezed, expanded, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, in, H, W)`` to ``(batch, 2 * expanded, H, W)``."""
        x = F.relu(self.squeeze(x))
        return torch.cat((F.relu(self.expand1x1(x)), F.relu(self.expand3x3(x))), dim=1)


class SqueezeNet(nn.Module):
    """Version 1.1: 1.24 M parameters in 26 convolutions."""

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 3, stride=2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, ceil_mode=True),
            Fire(64, 16, 64),
            Fire(128, 16, 64),
            nn.MaxPool2d(3, 2, ceil_mode=True),
            Fire(128, 32, 128),
            Fire(256, 32, 128),
            nn.MaxPool2d(3, 2, ceil_mode=True),
            Fire(256, 48, 192),
            Fire(384, 48, 192),
            Fire(384, 64, 256),
            Fire(512, 64, 256),
        )
        self.classifier = nn.Sequential(
            nn.Dropout(), nn.Conv2d(512, num_classes, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        )

    def forward(self, pictures: Tensor) -> Tensor:
        """``(batch, 3, 227, 227)``, red, green, blue, the mean taken off, to logits."""
        return self.classifier(self.features(pictures)).flatten(start_dim=1)


def read_pictures(folder: str | Path) -> tuple[Tensor, Tensor]:
    """The pictures of ``labels.csv`` as the network takes them, and their classes.

    Args:
        folder: with ``labels.csv`` (``file``, ``imagenet_class_0based``) and ``images/``.

    Returns:
        float32 ``(n, 3, 227, 227)`` and int64 ``(n,)``.
    """
    from PIL import Image

    folder = Path(folder)
    with (folder / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    pictures = []
    for row in rows:
        with Image.open(folder / "images" / row["file"]) as image:
            square = image.convert("RGB").resize((PICTURE_SIZE,) * 2, Image.Resampling.BILINEAR)
        pictures.append(torch.from_numpy(np.array(square)).permute(2, 0, 1).float() - MEAN)
    labels = torch.tensor([int(row["imagenet_class_0based"]) for row in rows])
    return torch.stack(pictures), labels
