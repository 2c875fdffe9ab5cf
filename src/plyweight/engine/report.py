"""Report: what an engine holds, what of it takes memory, and why."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from plyweight.engine.forms import Form

__all__ = ["EngineReport", "WarmReport"]


@dataclass(frozen=True)
class WarmReport:
    """A bit-width whose session is ready.

    Attributes:
        bit_width: of the model.
        num_bytes: that it takes, about, activations not counted.
        num_requests: that compute with it now.
        reason: why it is there.
    """

    bit_width: int
    num_bytes: int
    num_requests: int
    reason: str


@dataclass(frozen=True)
class EngineReport:
    """What :meth:`Engine.report` says.

    Attributes:
        name: of the source.
        artifact_id: of the artifact.
        backend: that computes.
        providers: of the backend, in order of preference.
        bit_width: that the next request is answered at.
        bit_widths: that can be switched to without reading anything.
        stored_bit_widths: of the artifact.
        held_bytes: of header and layers in memory.
        warm: bit-widths with a session, the current one first.
        warm_bytes: that those beside the current one may take.
        forms: how each module computes at the current bit-width, and why, by its prefix in the
            graph.
    """

    name: str
    artifact_id: str
    backend: str
    providers: tuple[str, ...]
    bit_width: int
    bit_widths: tuple[int, ...]
    stored_bit_widths: tuple[int, ...]
    held_bytes: int
    warm: tuple[WarmReport, ...]
    warm_bytes: int
    forms: Mapping[str, Form]

    @property
    def resident_bytes(self) -> int:
        """Of layers and sessions together."""
        return self.held_bytes + sum(warm.num_bytes for warm in self.warm)

    def __str__(self) -> str:
        """A line, one for the layers, one for each session, and one for each form of modules."""
        held, stored = (
            ", ".join(map(str, widths)) for widths in (self.bit_widths, self.stored_bit_widths)
        )
        lines = [
            f"{self.name}: {self.bit_width} bits on {self.backend} "
            f"({', '.join(self.providers)}), {self.resident_bytes:,} bytes resident",
            f"  {self.held_bytes:,} bytes: layers of {held} bits (of {stored} that are stored)",
        ]
        lines += [
            f"  {warm.num_bytes:,} bytes: session of {warm.bit_width} bits, {warm.reason}"
            for warm in self.warm
        ]
        counts = Counter((form.kind, form.reason) for form in self.forms.values())
        lines += [f"  {number} x {kind}: {reason}" for (kind, reason), number in counts.items()]
        return "\n".join(lines)
