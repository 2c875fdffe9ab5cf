"""Every way plyweight can go wrong, as one tree.

    PlyweightError
      x ArtifactError              the bytes of an artifact are wrong
        + HeaderError                its header breaks a rule of docs/format.md
        + VersionError               its version or a required feature is unknown here
        + DigestError                a layer differs from the digest the header states
        + TruncatedError             the bytes end inside a layer
      x DeliveryError              the bytes did not arrive
        + SourceError                a source cannot be opened or read
        + RangeError                 a byte range was asked for that the source does not have
        + TransferError              an attempt failed that may succeed when it is made again
        + StaleError                 the object at the source is not the one that was begun with
        + BudgetError                not even the base layer fits what may be used
      x TrustError                 an artifact is not the one that is trusted
      x OutputError                a file cannot be written; nothing half-written is left
      x BitWidthError              a bit-width was asked for that is not there
      x LayeringError              a module cannot be layered, or an argument is wrong
      x EngineError                an engine cannot be made, or has been closed
        + GraphError                 an artifact has no graph, or one that cannot be computed here
        + InputError                 inputs are not those that the graph takes
      x KernelError                a kernel is not there, or is given what it cannot take
      x LossError                  a loss is NaN or infinite; training stops before it does harm
      x ModelMismatchError         a model and an artifact do not describe the same network

Every message is one sentence or two: what was asked, what there is, what to do.
"""

from collections.abc import Iterable, Sequence
from math import isfinite

__all__ = [
    "ArtifactError",
    "BitWidthError",
    "BudgetError",
    "DeliveryError",
    "DigestError",
    "EngineError",
    "GraphError",
    "HeaderError",
    "InputError",
    "KernelError",
    "LayeringError",
    "LossError",
    "ModelMismatchError",
    "OutputError",
    "PlyweightError",
    "RangeError",
    "SourceError",
    "StaleError",
    "TransferError",
    "TruncatedError",
    "TrustError",
    "TrustWarning",
    "VersionError",
    "listed",
]


def listed(items: Iterable[object], *, most: int = 8) -> str:
    """``items`` as a comma-separated list of at most ``most``, for a message."""
    words = [str(item) for item in items]
    if not words:
        return "nothing"
    rest = f" and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(words[:most]) + rest


class PlyweightError(Exception):
    """The root of every error that plyweight raises on purpose."""


class ArtifactError(PlyweightError, ValueError):
    """The bytes of an artifact are wrong."""


class HeaderError(ArtifactError):
    """The header breaks a rule of ``docs/format.md``."""


class VersionError(ArtifactError):
    """The artifact needs a newer reader."""


class DigestError(ArtifactError):
    """A layer's bytes differ from the digest in the header."""


class TruncatedError(ArtifactError):
    """The bytes end inside a layer instead of at its end."""


class DeliveryError(PlyweightError, OSError):
    """The bytes did not arrive."""


class SourceError(DeliveryError):
    """A source cannot be opened or read."""


class RangeError(DeliveryError):
    """A byte range was asked for that the source does not have."""


class TransferError(DeliveryError):
    """An attempt failed that may succeed when it is made again.

    Attributes:
        retry_after_s: how long the server asked to wait; None if it did not say.
    """

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class StaleError(DeliveryError):
    """The object at the source is not the one that was begun with."""


class BudgetError(DeliveryError):
    """Not even the base layer fits what may be used."""


class TrustError(PlyweightError):
    """An artifact is not the one that is trusted: by its id, its signature or its revision."""


class TrustWarning(UserWarning):
    """An artifact is believed though nothing vouches for it."""


class OutputError(PlyweightError, OSError):
    """A file cannot be written; nothing half-written is left."""


class BitWidthError(PlyweightError, ValueError):
    """A bit-width was asked for that is not there."""

    def __init__(
        self, asked: object, *, stored: Sequence[int], where: str, advice: str = ""
    ) -> None:
        if type(asked) is not int:
            super().__init__(
                f"the bit-width is {asked!r}, a {type(asked).__name__}; "
                f"give an integer, one of {listed(stored)}."
            )
            return
        advice = advice or f"Ask for one of those, or train again with {asked} among `bit_widths`."
        super().__init__(
            f"{asked} bits were asked for, but {where} stores {listed(stored)}. {advice}"
        )


class LayeringError(PlyweightError, ValueError):
    """A module or weight cannot be layered, or an option contradicts the model."""


class EngineError(PlyweightError, ValueError):
    """An engine cannot be made as it was asked for, or has been closed."""


class GraphError(EngineError):
    """An artifact has no graph, or one that cannot be computed here."""


class InputError(EngineError):
    """The inputs are not those that the graph takes."""


class KernelError(PlyweightError, ValueError):
    """A kernel is not there, or is given what it cannot compute with."""


class LossError(PlyweightError, ArithmeticError):
    """A loss is NaN or infinite.

    Attributes:
        step: how many steps were taken before this one.
        bit_width: of the loss.
        module: name of the first module whose outputs are not finite; None if all are.
    """

    def __init__(self, loss: float, *, step: int, bit_width: int, module: str | None) -> None:
        self.step, self.bit_width, self.module = step, bit_width, module
        if isfinite(loss):
            origin = "It is not finite in another process, which says where that comes from"
        elif module is None:
            origin = "All modules give finite values, so it comes from the criterion or the targets"
        else:
            where = repr(module) if module else "the model itself"
            origin = f"The first values that are not finite come out of {where}"
        super().__init__(
            f"the loss at {bit_width} bits is {loss} in step {step}. {origin}. Go back to the "
            "last checkpoint, and lower the learning rate or clip the gradients."
        )


class ModelMismatchError(PlyweightError, ValueError):
    """A model and an artifact do not describe the same network."""

    def __init__(self, *, artifact_only: Sequence[str], model_only: Sequence[str]) -> None:
        super().__init__(
            "the model does not match the artifact: "
            f"only the artifact has {listed(artifact_only)}; "
            f"only the model has {listed(model_only)}. "
            "Build the model with the same architecture as the one that was packed."
        )
