"""Engine: an artifact that answers, at any of its bit-widths, without torch.

    request ──► current session ──► outputs           one bit-width from start to end
    set_bit_width(b)     another session, made from the layers held where it is not warm
    upgrade(b)           reads the layers still missing, then as above
    downgrade(b)         gives back the layers and sessions above b

All of it may be called by any thread at any time. What is slow, reading and making a session,
keeps no request waiting; changes come one after the other, in the order in which they are ready.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from numpy.typing import NDArray

from plyweight.artifact import GRAPH_NAME, ArtifactReader, Graph, Header, Port
from plyweight.engine.backends import BACKENDS
from plyweight.engine.forms import Form, loaded
from plyweight.engine.inputs import check_inputs
from plyweight.engine.memory import give_back
from plyweight.engine.onnx_nodes import OnnxModel
from plyweight.engine.report import EngineReport, WarmReport
from plyweight.engine.session import Session, SessionOptions
from plyweight.engine.values import SlotValues, Views
from plyweight.engine.warm import Warm, WarmWidths
from plyweight.errors import ArtifactError, BitWidthError, GraphError

__all__ = ["Engine", "graph_of"]

Reopen = Callable[[int | None], tuple[ArtifactReader, int]]


class Engine:
    """What :func:`plyweight.open` returns. Close it, or use it in a ``with`` block.

    Args:
        reader: of the artifact.
        bit_width: to hold, and to compute at.
        reopen: a reader that has a bit-width (None: as many as there are), and which it is.
        backend: a key of ``BACKENDS``.
        options: of its sessions.
        warm_bytes: that sessions beside the current one may take.

    Raises:
        BitWidthError: If that bit-width is not held.
        ArtifactError: If the artifact is damaged.
        GraphError: If it has no graph, or one that cannot be computed here.
    """

    def __init__(
        self,
        reader: ArtifactReader,
        bit_width: int,
        *,
        reopen: Reopen,
        backend: str,
        options: SessionOptions,
        warm_bytes: int,
    ) -> None:
        self._header = reader.header
        self._name = reader.source.name
        self._reopen, self._backend, self._options = reopen, backend, options
        self._changes = threading.Lock()  # one change at a time; requests do not ask for it
        num_layers = self._header.layer_index(bit_width) + 1
        first = reader.read_layer(0)
        self._graph = graph_of(first, self._header, self._name)
        self._output_names = [port.name for port in self._graph.outputs]
        self._layers: tuple[Views, ...] = (
            first,
            *(reader.read_layer(i) for i in range(1, num_layers)),
        )
        self._onnx: dict[tuple[int, ...], OnnxModel] = {}  # read, by the bit-widths of each
        self._warm = WarmWidths(warm_bytes)
        self._warm.install(bit_width, *self._session(self._layers, bit_width))
        give_back()

    @property
    def inputs(self) -> tuple[Port, ...]:
        """What :meth:`run` takes: names, dtypes and shapes."""
        return self._graph.inputs

    @property
    def outputs(self) -> tuple[Port, ...]:
        """What :meth:`run` gives."""
        return self._graph.outputs

    @property
    def io(self) -> Mapping[str, Any]:
        """The artifact's own words about inputs, outputs, preprocessing and labels."""
        return self._header.io or {}

    @property
    def bit_width(self) -> int:
        """That the next request is answered at."""
        return self._warm.current.bit_width

    @property
    def bit_widths(self) -> tuple[int, ...]:
        """Those whose layers are held, ascending: what :meth:`set_bit_width` takes."""
        return self._header.bit_widths[: len(self._layers)]

    @property
    def stored_bit_widths(self) -> tuple[int, ...]:
        """Those of the artifact, ascending: what :meth:`upgrade` takes, if the source has them."""
        return self._header.bit_widths

    def run(self, inputs: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
        """The outputs by name, all of it computed at one bit-width.

        Args:
            inputs: arrays by name, as ``inputs`` lists them.

        Raises:
            InputError: If a name, dtype or shape is not what the graph takes.
            EngineError: If the engine is closed.
            GraphError: If the runtime fails.
        """
        feeds = check_inputs(self._graph.inputs, inputs)
        outputs = self._warm.run(feeds)
        return dict(zip(self._output_names, outputs, strict=True))

    def set_bit_width(self, bit_width: int) -> None:
        """Answer the requests that come from now on at ``bit_width``, one that is held.

        Raises:
            BitWidthError: If it is not held.
            EngineError: If the engine is closed.
        """
        self._require_held(bit_width)
        # A warm one needs no turn among the changes, which may be making others.
        if not self._warm.switch(bit_width):
            with self._changes:
                self._require_held(bit_width)  # a downgrade may have come in between
                self._compute_at(bit_width, self._layers)

    def upgrade(self, bit_width: int | None = None) -> None:
        """Hold and compute at ``bit_width``: reads only the layers that are missing.

        Requests are answered at the earlier bit-width until all of it is there.

        Args:
            bit_width: None for the widest that the source has and the limits given to
                :func:`plyweight.open` allow.

        Raises:
            BitWidthError: If that bit-width is not stored, or the source ends before it.
            ArtifactError: If the source is damaged or another artifact. The engine stays as it was.
            DeliveryError: If it does not arrive.
            EngineError: If the engine is closed.
        """
        _ = self._warm.current  # a closed engine reads nothing
        reader, target = self._reopen(bit_width)
        if reader.header.artifact_id != self._header.artifact_id:
            raise ArtifactError(
                f"{reader.source.name} is artifact {reader.header.artifact_id[:12]}, but the "
                f"engine holds {self._header.artifact_id[:12]}; open the other one anew instead."
            )
        num_layers = self._header.layer_index(target) + 1
        read: dict[int, Views] = {}
        while True:
            for index in range(len(self._layers), num_layers):
                if index not in read:
                    read[index] = reader.read_layer(index)
            with self._changes:
                missing = range(len(self._layers), num_layers)
                # Downgraded meanwhile, it lacks more; nothing is read twice, so this ends.
                if all(index in read for index in missing):
                    layers = (*self._layers, *(read[index] for index in missing))
                    self._compute_at(target, layers)
                    self._layers = layers
                    return

    def downgrade(self, bit_width: int) -> None:
        """Compute at ``bit_width`` and give back the memory of everything above.

        Requests that are under way end at the bit-width they began with; the memory is free when
        this returns.

        Raises:
            BitWidthError: If it is not held.
            EngineError: If the engine is closed.
        """
        with self._changes:
            self._require_held(bit_width)
            self._compute_at(bit_width, self._layers)
            self._layers = self._layers[: self._header.layer_index(bit_width) + 1]
            self._warm.drop(lambda width: width > bit_width)
        give_back()

    def close(self) -> None:
        """Wait for the requests under way, and give everything back. A second call does nothing."""
        with self._changes:
            self._warm.close()
            self._layers = ()
            self._onnx.clear()
        give_back()

    def report(self) -> EngineReport:
        """What is held, what takes memory, and why.

        Raises:
            EngineError: If the engine is closed.
        """
        current, bit_widths = self._warm.current, self.bit_widths
        bit_width = current.bit_width
        return EngineReport(
            name=self._name,
            artifact_id=self._header.artifact_id,
            backend=self._backend,
            providers=current.session.provider_names,
            bit_width=bit_width,
            bit_widths=bit_widths,
            stored_bit_widths=self._header.bit_widths,
            held_bytes=self._header.prefix_bytes(bit_widths[-1]),
            warm=tuple(self._warm_report(warm, bit_width) for warm in self._warm.all()),
            warm_bytes=self._warm.most_bytes,
            forms=current.forms,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        held = ", ".join(map(str, self.bit_widths)) or "no"
        return f"<Engine of {self._name} holding {held} bits>"

    def _compute_at(self, bit_width: int, layers: Sequence[Views]) -> None:
        """Make that session current, a new one where it is not warm."""
        if not self._warm.switch(bit_width):
            self._warm.install(bit_width, *self._session(layers, bit_width))
            give_back()

    def _session(
        self, layers: Sequence[Views], bit_width: int
    ) -> tuple[Session, Mapping[str, Form]]:
        backend, model = BACKENDS[self._backend], self._graph.model_for(bit_width)
        values = SlotValues(self._header, self._graph, layers, bit_width)
        onnx = self._onnx.setdefault(model.bit_widths, OnnxModel(model.data))
        ready = loaded(self._graph, model, values, backend.runtime(self._options), onnx)
        del values  # which keeps what modules share
        return backend.session(self._graph, ready, self._options), ready.forms

    def _require_held(self, bit_width: int) -> None:
        _ = self._warm.current  # a closed engine holds nothing, which is not what is wrong
        if type(bit_width) is not int or bit_width not in self.bit_widths:
            raise BitWidthError(
                bit_width,
                stored=self.bit_widths,
                where="the engine",
                advice=f"Call upgrade({bit_width}) first."
                if bit_width in self.stored_bit_widths
                else f"The artifact stores {', '.join(map(str, self.stored_bit_widths))}.",
            )

    def _warm_report(self, warm: Warm, current: int) -> WarmReport:
        if warm.bit_width == current:
            reason = "which answers now"
        else:
            reason = f"used before, kept as long as {self._warm.most_bytes:,} bytes are enough"
        return WarmReport(warm.bit_width, warm.session.num_bytes, warm.num_requests, reason)


def graph_of(views: Views, header: Header, name: str) -> Graph:
    """The graph in the base layer, once the artifact is known to have what it names.

    Raises:
        GraphError: If there is none.
        ArtifactError: If it breaks a rule.
    """
    if GRAPH_NAME not in views:
        raise GraphError(
            f"{name} has no graph, so it can only be loaded into a torch model; add one by packing "
            "the model with plyweight.pack(model, file, example_inputs=...)."
        )
    try:
        graph = Graph.from_bytes(views[GRAPH_NAME].data)
        graph.check(header)
    except ArtifactError as error:
        raise type(error)(f"{name}: {error}") from error
    return graph
