"""Budget: the widest bit-width that a device can afford, and why it is that one.

    bytes on the wire and disk   the prefix: header and layers up to that bit-width
    memory                       what a packed model takes on the CPU while it computes, beside what
                                 Python and torch take themselves and without activations: the
                                 prefix; what of it is no plane once more, as tensors of their own;
                                 the largest weight decoded to float32, and the blocks it is
                                 decoded by
    time                         the bytes that are not here yet, at the measured rate of the link

A bit-width that is asked for by its number is never replaced by another one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from plyweight.artifact import Header, LayeredWeight
from plyweight.errors import BudgetError, LayeringError

__all__ = ["Budget", "Choice"]

FLOAT_BYTES = 4
# At most, to decode a weight by blocks into pages of its own: 2 MiB that are not filled, and what
# is computed on the way (`plyweight.nn.packed`).
DECODING_BYTES = 2**22


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Attributes:
        bit_width: of the model.
        reason: one sentence for people.
    """

    bit_width: int
    reason: str


@dataclass(frozen=True)
class Budget:
    """What may be used; None where there is no limit.

    Attributes:
        bit_width: exactly this one.
        max_bytes: of the prefix.
        max_ram: bytes that the loaded model may take.
        deadline_s: seconds until the last byte is here.

    Raises:
        LayeringError: If a limit is not a positive number, or stands beside a bit-width.
    """

    bit_width: int | None = None
    max_bytes: int | None = None
    max_ram: int | None = None
    deadline_s: float | None = None

    def __post_init__(self) -> None:
        limits = {k: v for k, v in vars(self).items() if k != "bit_width" and v is not None}
        for name, value in limits.items():
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not (is_number and 0 < value < float("inf")):
                raise LayeringError(f"{name} is {value!r}; give a positive number.")
        if self.bit_width is not None and limits:
            raise LayeringError(
                f"bit_width={self.bit_width!r} and {next(iter(limits))} were both given; give the "
                "bit-width, or limits from which it is chosen."
            )

    def choose(
        self,
        header: Header,
        *,
        held_bytes: int = 0,
        left_s: float | None = None,
        rate: Callable[[], float] | None = None,
    ) -> Choice:
        """The widest bit-width that fits.

        Args:
            header: of the artifact.
            held_bytes: of its prefix, that are here already.
            left_s: seconds until the deadline; ``deadline_s`` if None.
            rate: measures the link, in bytes a second; asked only where a deadline depends on it.

        Raises:
            BitWidthError: If the bit-width asked for is not stored.
            BudgetError: If not even the narrowest fits.
        """
        if self.bit_width is not None:
            header.layer_index(self.bit_width)
            return Choice(self.bit_width, f"{self.bit_width} bits, as asked")
        refusals = self._refusals(header, held_bytes, left_s, rate)
        fitting = [b for b in header.bit_widths if refusals(b) is None]
        # What is needed grows with the bit-width, so those that fit are the first ones.
        if not fitting:
            raise BudgetError(
                f"not even {header.bit_widths[0]} bits of {header.model.name} fit: they need "
                f"{refusals(header.bit_widths[0])}; allow more, or publish a smaller model."
            )
        chosen = fitting[-1]
        wider = header.bit_widths[len(fitting) :]
        if not wider:
            return Choice(chosen, f"{chosen} bits, the widest there is")
        return Choice(
            chosen, f"{chosen} bits, the widest that fits: {wider[0]} need {refusals(wider[0])}"
        )

    def _refusals(
        self,
        header: Header,
        held_bytes: int,
        left_s: float | None,
        rate: Callable[[], float] | None,
    ) -> Callable[[int], str | None]:
        """What a bit-width needs more of than may be used; None where it fits."""
        decoded = max(map(_decoded_bytes, header.weights.values()))
        speed: float | None = None
        seconds = self.deadline_s if left_s is None else left_s
        if self.deadline_s is not None and held_bytes < header.file_bytes:
            if rate is None:
                raise LayeringError(
                    "deadline_s was given, but nothing is fetched; give max_bytes or max_ram."
                )
            speed = rate()

        def refusal(bit_width: int) -> str | None:
            prefix = header.prefix_bytes(bit_width)
            memory = prefix + _copied_bytes(header, bit_width) + decoded
            if self.max_bytes is not None and prefix > self.max_bytes:
                return f"{prefix:,} bytes (max_bytes {self.max_bytes:,})"
            if self.max_ram is not None and memory > self.max_ram:
                return f"about {memory:,} bytes of memory (max_ram {self.max_ram:,})"
            if speed is not None and seconds is not None:
                needed = max(prefix - held_bytes, 0) / speed
                if needed > max(seconds, 0):  # what is here is here, however late it is
                    return (
                        f"{needed:.3g} s at the {speed / 1e6:.3g} MB/s of this link "
                        f"({max(seconds, 0):.3g} s are left)"
                    )
            return None

        return refusal


def _copied_bytes(header: Header, bit_width: int) -> int:
    """Of the layers up to ``bit_width``, those that are no planes; planes are used as they lie."""
    weights = header.weights.values()
    planes = sum(weight.width_at(bit_width) * weight.plane_bytes for weight in weights)
    return header.prefix_bytes(bit_width) - header.data_start - planes


def _decoded_bytes(weight: LayeredWeight) -> int:
    """What it takes to compute with ``weight``: its values, its scales times gain, a block."""
    values = FLOAT_BYTES * weight.num_weights
    return values + FLOAT_BYTES * prod(weight.scale_shape) + min(4 * values, DECODING_BYTES)
