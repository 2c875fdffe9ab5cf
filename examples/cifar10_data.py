"""CIFAR-10 on one device, and batches that are a pure function of seed and step.

Because ``batch(step, seed=...)`` needs no state, a run that was killed goes on with the very images
it would have seen, and each of several processes takes its own part of the same batch.

The last fifth of the official training images is held out, 10,000 of 50,000: accuracies are
measured there, and training never sees them.
"""

import pickle
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Cifar10", "DataError", "augmented"]

MEAN = torch.tensor((0.485, 0.456, 0.406)).view(1, 3, 1, 1)
STD = torch.tensor((0.229, 0.224, 0.225)).view(1, 3, 1, 1)
NUM_CLASSES = 10
HELD_OUT_SHARE = 5  # one in five
NUM_SHEETS, NUM_TRAINING_SHEETS, SHEET_SIZE = 51, 50, 1_000
PADDING = 4
NUM_SEEDS = 2**63  # a generator takes no larger ones
# The official files are pickles, which could run anything; these are all that arrays ask for.
PICKLED = {
    ("ndarray", "numpy"),
    ("dtype", "numpy"),
    ("_reconstruct", "numpy"),
    ("encode", "_codecs"),
}


class DataError(Exception):
    """The images are not where they were said to be, or not as they should be."""


@dataclass(frozen=True)
class Cifar10:
    """Images uint8 ``(n, 3, 32, 32)`` and labels int64 ``(n,)``.

    Attributes:
        train_images: what is trained on.
        test_images: held-out images that accuracies are measured on.
        official_images: official test images that are reported beside them; may be empty.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    official_images: Tensor
    official_labels: Tensor

    @classmethod
    def load(cls, folder: str | Path, *, num_train: int | None = None) -> "Cifar10":
        """Read a folder in torchvision's layout, or one of WebP sheets with ``labels.npy``.

        Args:
            folder: with ``cifar-10-batches-py`` in it (or being it), or with ``b00.webp`` ...
            num_train: how many of the images to train on, for quick runs; None for all.

        Raises:
            DataError: If the folder has neither, or what it has is damaged.
        """
        folder = Path(folder)
        batches = folder if folder.name == "cifar-10-batches-py" else folder / "cifar-10-batches-py"
        if (folder / "labels.npy").is_file():
            images, labels = _read_sheets(folder)
            num_official = (NUM_SHEETS - NUM_TRAINING_SHEETS) * SHEET_SIZE
        elif batches.is_dir():
            images, labels, num_official = _read_torchvision(batches)
        else:
            raise DataError(
                f"{folder} has neither labels.npy with WebP sheets nor cifar-10-batches-py; give "
                "the folder that torchvision.datasets.CIFAR10 downloads to."
            )
        _check_labels(labels, num_images=len(images), folder=folder)
        end = len(images) - num_official
        num_held_out = end // HELD_OUT_SHARE
        most = end - num_held_out
        num_train = most if num_train is None else num_train
        if not num_held_out or not 1 <= num_train <= most:
            raise DataError(
                f"{num_train:,} images to train on were asked for; {folder} has {end:,}, of which "
                f"{num_held_out:,} are held out. Give 1 to {most:,}, or a folder that has more."
            )
        ranges = slice(0, num_train), slice(end - num_held_out, end), slice(end, None)
        return cls(*(tensor[part] for part in ranges for tensor in (images, labels)))

    @property
    def fingerprint(self) -> str:
        """Eight hex digits that tell these training images and labels from others."""
        crc = zlib.crc32(self.train_images.cpu().numpy().tobytes())
        return f"{zlib.crc32(self.train_labels.cpu().numpy().tobytes(), crc):08x}"

    def to(self, device: torch.device) -> "Cifar10":
        """The same on ``device``."""
        return Cifar10(*(tensor.to(device) for tensor in vars(self).values()))

    def steps_per_epoch(self, batch_size: int) -> int:
        """Whole batches in one pass over the training images."""
        return len(self.train_images) // batch_size

    def batch(
        self,
        step: int,
        batch_size: int,
        *,
        seed: int,
        part: int = 0,
        parts: int = 1,
        is_augmented: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """The batch of one step, shuffled by epoch: normalized images, labels.

        Args:
            step: counted from 0 over all epochs.
            batch_size: of all parts together.
            seed: of order and augmentation.
            part: which of ``parts`` equal parts of the batch is wanted.
            parts: how many processes share the batch.
            is_augmented: whether images are shifted by up to 4 pixels and mirrored at random.
        """
        epoch, index = divmod(step, self.steps_per_epoch(batch_size))
        seed_of_epoch = seed * 1_000_003 + epoch
        generator = torch.Generator().manual_seed(seed_of_epoch % NUM_SEEDS)
        order = torch.randperm(len(self.train_images), generator=generator)
        chosen = order[index * batch_size : (index + 1) * batch_size]
        generator.manual_seed((seed_of_epoch * 1_000_003 + index + 1) % NUM_SEEDS)
        corners = torch.randint(2 * PADDING + 1, (batch_size, 2), generator=generator)
        mirrored = torch.rand(batch_size, generator=generator) < 0.5
        mine = slice(part, None, parts)
        chosen = chosen[mine].to(self.train_images.device)
        images = self.train_images[chosen]
        if is_augmented:
            images = augmented(images, corners[mine], mirrored[mine])
        return normalized(images), self.train_labels[chosen]

    def test_batches(
        self, batch_size: int = 125, *, official: bool = False
    ) -> list[tuple[Tensor, Tensor]]:
        """The test images as they are, normalized.

        Larger batches are slower on a CPU: tensors of 16 MB and more are no longer kept for reuse.
        """
        images = self.official_images if official else self.test_images
        labels = self.official_labels if official else self.test_labels
        pairs = zip(images.split(batch_size), labels.split(batch_size), strict=True)
        return [(normalized(part), of_part) for part, of_part in pairs if len(part)]


def augmented(images: Tensor, corners: Tensor, mirrored: Tensor) -> Tensor:
    """Each image padded with black, cropped at its corner, and mirrored or not.

    Args:
        images: ``(batch, 3, height, width)``.
        corners: ``(batch, 2)``, first row and column of the crop, 0 to 8.
        mirrored: ``(batch,)``, which ones to mirror.
    """
    batch, _, height, width = images.shape
    device = images.device
    corners, mirrored = corners.to(device), mirrored.to(device)
    padded = F.pad(images, (PADDING,) * 4).permute(0, 2, 3, 1)
    rows = corners[:, :1] + torch.arange(height, device=device)
    across = torch.arange(width, device=device).expand(batch, width)
    across = torch.where(mirrored[:, None], across.flip(1), across)
    columns = corners[:, 1:] + across
    index = torch.arange(batch, device=device)[:, None, None]
    return padded[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def normalized(images: Tensor) -> Tensor:
    """uint8 to what the networks take, float32."""
    mean, std = MEAN.to(images.device), STD.to(images.device)
    return ((images.float() / 255 - mean) / std).contiguous()


def _check_labels(labels: Tensor, *, num_images: int, folder: Path) -> None:
    """One label from 0 to 9 for every image."""
    if len(labels) != num_images:
        raise DataError(f"{folder} has {num_images:,} images, but {len(labels):,} labels.")
    wrong = labels[(labels < 0) | (labels >= NUM_CLASSES)]
    if len(wrong):
        raise DataError(
            f"{folder} has the label {int(wrong[0])}, but the networks tell {NUM_CLASSES} classes "
            f"apart; labels are 0 to {NUM_CLASSES - 1}."
        )


def _read_sheets(folder: Path) -> tuple[Tensor, Tensor]:
    """51 lossless sheets of 25 x 40 images, in official order, the test images last."""
    from PIL import Image  # only those who have sheets need it

    sheets = []
    for number in range(NUM_SHEETS):
        path = folder / f"b{number:02d}.webp"
        try:
            with Image.open(path) as image:
                sheet = np.asarray(image.convert("RGB"))
            sheets.append(sheet.reshape(25, 32, 40, 32, 3).transpose(0, 2, 4, 1, 3))
        except (OSError, ValueError) as error:  # missing, no image, or of another size
            raise DataError(
                f"{path} is not a sheet of 25 x 40 images ({error}); the {NUM_SHEETS} sheets "
                "belong together."
            ) from error
    images = np.concatenate(sheets).reshape(NUM_SHEETS * SHEET_SIZE, 3, 32, 32)
    return torch.from_numpy(images), _labels_of(folder / "labels.npy")


def _labels_of(path: Path) -> Tensor:
    try:
        return torch.from_numpy(np.load(path).astype(np.int64).reshape(-1))
    except (OSError, ValueError, TypeError, EOFError) as error:  # EOFError: the file is empty
        raise DataError(f"{path} holds no labels ({error}).") from error


def _read_torchvision(folder: Path) -> tuple[Tensor, Tensor, int]:
    """Images, labels, and how many of them, at the end, are official test images."""
    images, labels = [], []
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        entry = _unpickled(folder / name)
        try:
            pixels = np.asarray(entry["data"], dtype=np.uint8)
            images.append(pixels.reshape(len(pixels), 3, 32, 32))
            labels.append(np.asarray(entry["labels"], dtype=np.int64).reshape(-1))
        except (ValueError, TypeError, OverflowError) as error:  # another size, or no bytes
            raise DataError(
                f"{folder / name} has no labelled images of 32 x 32 pixels in three colours "
                f"({error}); let torchvision download the data again."
            ) from error
    return (
        torch.from_numpy(np.concatenate(images)),
        torch.from_numpy(np.concatenate(labels)),
        len(images[-1]),
    )


class _OnlyArrays(pickle.Unpickler):
    """Makes numpy arrays, and refuses to call anything else."""

    def find_class(self, module: str, name: str) -> object:
        """The function or class that the pickle names, if an array needs it."""
        if (name, module.split(".")[0]) not in PICKLED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no image needs")
        return super().find_class(module, name)


def _unpickled(path: Path) -> dict[str, object]:
    """One of the official files: ``data`` of ``(n, 3072)`` bytes, and ``labels``."""
    try:
        with path.open("rb") as file:
            entry = _OnlyArrays(file, encoding="latin1").load()
        return {name: entry[name] for name in ("data", "labels")}
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing; let torchvision download the data again.") from error
    except Exception as error:  # bytes that are no pickle make the unpickler raise anything
        raise DataError(f"{path} is not a batch of CIFAR-10 ({error}).") from error
