"""Pictures and arrays: what a person has in a file becomes what a graph takes.

An artifact says in ``layered.io`` how pictures are prepared:

    "preprocessing": {"size": [height, width], "mean": ["0.5", ...], "std": ["0.25", ...],
                      "layout": "NCHW" or "NHWC"}

The picture is scaled until it just covers ``size`` and cut to its middle; its channels, as many as
``mean`` has (1: grey, 3: red, green, blue), go from 0 to 1, less ``mean``, by ``std``.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plyweight.errors import InputError, SourceError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from plyweight.artifact import Port

__all__ = ["read_input", "top"]

MODES = {1: "L", 3: "RGB"}
MAX_SIDE = 2**14


def read_input(path: Path, port: "Port", io: Mapping[str, Any]) -> "NDArray[Any]":
    """The array in a file of numpy, or that of a picture; a batch of one where it has no batch.

    Args:
        path: of a ``.npy`` file or a picture.
        port: that it is for.
        io: what the artifact says of its inputs.

    Raises:
        SourceError: If the file cannot be read.
        InputError: If the artifact does not say how pictures are prepared.
        ImportError: If pillow is needed and missing.
    """
    array = _read_array(path) if path.suffix == ".npy" else _read_picture(path, io)
    return array[None] if array.ndim == len(port.shape) - 1 else array


def _read_array(path: Path) -> "NDArray[Any]":
    import numpy as np

    try:
        array: NDArray[Any] = np.load(path, allow_pickle=False)
    except OSError as error:
        raise _unreadable(path, error) from error
    except (ValueError, EOFError) as error:
        raise SourceError(
            f"{path} is no array ({error}); write one with numpy.save(path, array)."
        ) from error
    return array


def _read_picture(path: Path, io: Mapping[str, Any]) -> "NDArray[Any]":
    import numpy as np

    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ModuleNotFoundError as error:
        raise ImportError(
            f"reading {path} needs pillow, which is not installed; install it with: pip install "
            "pillow; or give an array in a .npy file."
        ) from error
    if "preprocessing" not in io:
        raise InputError(
            f"{path} is a picture, but the artifact does not say how to prepare one; give an array "
            "in a .npy file."
        )
    (height, width), mean, std, layout = _settings(io["preprocessing"])
    try:
        with Image.open(path) as picture:
            fitted = ImageOps.fit(picture.convert(MODES[len(mean)]), (width, height))
    except UnidentifiedImageError as error:
        raise SourceError(
            f"{path} is no picture that pillow knows; give another, or an array in a .npy file."
        ) from error
    except (OSError, Image.DecompressionBombError) as error:
        raise _unreadable(path, error) from error
    pixels = np.asarray(fitted, np.float32).reshape(height, width, len(mean)) / np.float32(255)
    array = (pixels - np.array(mean, np.float32)) / np.array(std, np.float32)
    return np.ascontiguousarray(array.transpose(2, 0, 1) if layout == "NCHW" else array)


def _settings(value: Any) -> tuple[list[int], list[float], list[float], str]:
    """Size, mean, std and layout, of untrusted values.

    Raises:
        InputError: If they are not of that kind.
    """
    try:
        size, layout = [int(side) for side in value["size"]], value["layout"]
        mean, std = ([float(x) for x in value[key]] for key in ("mean", "std"))
        is_good = (
            len(size) == 2
            and all(1 <= side <= MAX_SIDE for side in size)
            and len(mean) == len(std)
            and len(mean) in MODES
            and all(x > 0 for x in std)
            and layout in ("NCHW", "NHWC")
        )
    except (KeyError, TypeError, ValueError):
        is_good = False
    if not is_good:
        raise InputError(
            "what the artifact says of preparing pictures is not understood; give an array in a "
            ".npy file."
        )
    return size, mean, std, layout


def _unreadable(path: Path, error: Exception) -> SourceError:
    reason = getattr(error, "strerror", None) or error
    return SourceError(f"{path} cannot be read ({reason}); check the path.")


def top(scores: "NDArray[Any]", count: int, labels: Sequence[str]) -> list[dict[str, Any]]:
    """The best ``count`` of a row of logits: index, label, logit and its share by softmax."""
    import numpy as np

    row = scores.astype(np.float64)
    shares = np.exp(row - row.max())
    shares /= shares.sum()
    best = np.argsort(-row, kind="stable")[:count]
    return [
        {
            "index": int(i),
            "label": labels[i] if i < len(labels) else str(i),
            "logit": float(row[i]),
            "share": float(shares[i]),
        }
        for i in best
    ]
