"""Edges: 8-bit grids where ONNX Runtime would compute in float for want of one.

It runs a convolution on integers only if its output is rounded to a grid too. The output of most
is rounded by the learned quantizer of the next module. The others go into an addition, a pooling,
several modules: an *edge*, which gets a grid of 8 bits of its own, calibrated per bit-width.

What goes from computing nodes (convolutions, additions) through moving ones (MaxPool, Concat,
Slice, ...) to those that read it is one *net*, on one grid, rounded where it is computed:

    read by one learned quantizer alone      that quantizer, moved up in front of what moves values
    read by others too                       an edge; learned quantizers read what it rounded

(An edge that the network rounds itself, see ``fitting``, is a learned quantizer here.)

An addition is computed on integers where both operands are; its sum then is a net too.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

import onnx_ir as ir

from plyweight.graph.marks import (
    absorb_clamps,
    clamp_first,
    clamp_of,
    is_mark,
    is_moving,
    mark_source,
    marks_of,
    moved_inputs,
    prefix_of,
)
from plyweight.graph.places import Places
from plyweight.graph.scopes import scopes_of

__all__ = ["Edge", "insert_edges", "readers_of"]


@dataclass(frozen=True)
class Edge:
    """A grid of 8 bits that no training has learned.

    Attributes:
        prefix: of its slots.
        readers: the learned quantizers that read it.
        is_read_as_float: whether something else does.
        place: the module of the torch network whose output it is; None if there is none, or it
            was not asked for.
    """

    prefix: str
    readers: tuple[str, ...]
    is_read_as_float: bool
    place: str | None = None


@dataclass
class _Net:
    """Values that moving nodes connect."""

    values: list[ir.Value] = field(default_factory=list)

    def sources(self) -> list[ir.Value]:
        """Those that are computed, not moved."""
        return [v for v in self.values if not is_moving(v.producer())]

    def readers(self) -> list[ir.Node]:
        """Who reads one of them and computes; twice, if it reads two."""
        uses = [(use.node, use.idx) for v in self.values for use in v.uses()]
        return [node for node, index in uses if not _moves(node, index)]

    def bottlenecks(self) -> list[ir.Value]:
        """Values whose rounding is that of all that is read: a sole source, what all read."""
        read = [v for v in self.values if any(not _moves(u.node, u.idx) for u in v.uses())]
        read += [v for v in self.values if v.is_graph_output() and v not in read]
        sources = self.sources()
        return [values[0] for values in (sources, read) if len(values) == 1]

    def is_output(self) -> bool:
        return any(value.is_graph_output() for value in self.values)


def insert_edges(
    graph: ir.Graph, convolutions: Collection[ir.Value], places: Places | None = None
) -> list[Edge]:
    """Round the outputs of ``convolutions`` and what is added up of them, in place.

    Args:
        graph: whose modules read their inputs through marks.
        convolutions: outputs of convolutions on integers.
        places: where values are rounded in torch, if that is to be found out.

    Returns:
        The edges, in the order of execution. The marks of all others have been moved.
    """
    clamp_first(graph)
    nets = _integer_nets(graph, convolutions)
    order = {value: i for i, node in enumerate(graph) for value in node.outputs}
    nets.sort(key=lambda net: min(order.get(value, -1) for value in net.values))
    edges: list[Edge] = []
    for net in nets:
        readers = net.readers()
        learned = list(dict.fromkeys(prefix_of(node) for node in readers if is_mark(node)))
        others = [node for node in readers if not is_mark(node)]
        if not readers or (not learned and net.is_output() and not others):
            continue  # what the model gives back stays float
        if len(learned) == 1 and not others and not net.is_output():
            _move_up(graph, net, learned[0])
            continue
        prefix = _name(net.sources()[0], {edge.prefix for edge in edges})
        place = None if places is None else places.of(net.bottlenecks())
        _round_sources(graph, net, prefix)
        edges.append(Edge(prefix, tuple(learned), bool(others) or net.is_output(), place))
    absorb_clamps(graph)
    return edges


def readers_of(graph: ir.Graph, prefixes: Collection[str]) -> dict[str, tuple[str, ...]]:
    """The quantizers that read what the marks of ``prefixes`` rounded, by prefix."""
    found: dict[str, tuple[str, ...]] = {}
    for node in marks_of(graph):
        if prefix_of(node) in prefixes:
            users = node.outputs[0].consumers()
            found[prefix_of(node)] = tuple(prefix_of(user) for user in users if is_mark(user))
    return found


def _integer_nets(graph: ir.Graph, convolutions: Collection[ir.Value]) -> list[_Net]:
    """The nets that begin at a convolution, or an addition of two of them."""
    nets: dict[ir.Value, _Net] = {}  # by each of its values
    for node in graph:  # an addition comes after its operands
        operands = [value for value in node.inputs if value is not None]
        if (
            node.op_type == "Add"
            and node.domain == ""
            and all(v in nets or _is_rounded(v) for v in operands)
        ):
            _add(nets, _behind_clamp(node.outputs[0]))
        for out in node.outputs:
            if out in convolutions:
                _add(nets, _behind_clamp(out))
    unique = {id(net): net for net in nets.values()}
    return list(unique.values())


def _is_rounded(value: ir.Value) -> bool:
    """Whether ``value`` is on a grid already, as it was rounded or moved after that."""
    producer = value.producer()
    if producer is None or not is_moving(producer):
        return is_mark(producer)
    return all(_is_rounded(moved) for moved in _moved(producer))


def _add(nets: dict[ir.Value, _Net], value: ir.Value) -> None:
    """Add the net of ``value``: all that moving nodes connect with it."""
    if value in nets:
        return
    net, waiting = _Net(), [value]
    while waiting:
        current = waiting.pop()
        if current in nets:
            continue
        nets[current] = net
        net.values.append(current)
        waiting.extend(_connected(current))


def _connected(value: ir.Value) -> Iterator[ir.Value]:
    for use in value.uses():
        if _moves(use.node, use.idx):
            yield from use.node.outputs
            yield from _moved(use.node)
    producer = value.producer()
    if is_moving(producer):
        assert producer is not None
        yield from producer.outputs
        yield from _moved(producer)


def _moved(node: ir.Node) -> Iterator[ir.Value]:
    for index in moved_inputs(node):
        value = node.inputs[index]
        assert value is not None
        yield value


def _moves(node: ir.Node, index: int) -> bool:
    """Whether ``node`` moves what it reads as input ``index``."""
    return is_moving(node) and index in moved_inputs(node)


def _behind_clamp(value: ir.Value) -> ir.Value:
    """The value behind the ReLU or clip that alone reads ``value``, or ``value``."""
    users = list(value.uses())
    if len(users) == 1 and not value.is_graph_output() and clamp_of(users[0].node) is not None:
        return users[0].node.outputs[0]
    return value


def _move_up(graph: ir.Graph, net: _Net, prefix: str) -> None:
    """Let what a learned quantizer reads be rounded where it is computed."""
    for node in net.readers():
        value = node.inputs[0]
        assert value is not None
        node.outputs[0].replace_all_uses_with(value)
        graph.remove(node, safe=True)
    _round_sources(graph, net, prefix)


def _round_sources(graph: ir.Graph, net: _Net, prefix: str) -> None:
    for source in net.sources():
        mark_source(graph, source, prefix, name=f"{source.name}/edge")


def _name(source: ir.Value, taken: set[str]) -> str:
    """``<module>:<what computed it>``, and a number where there are several."""
    node = source.producer()
    assert node is not None
    clamped = clamp_of(node) is not None and node.inputs[0] is not None
    computed = node.inputs[0].producer() if clamped else node  # type: ignore[union-attr]
    assert computed is not None
    name = f"{scopes_of(computed)[-1]}:{computed.op_type.lower()}".lstrip(":")
    number = 2
    unique = name
    while unique in taken:
        unique, number = f"{name}:{number}", number + 1
    return unique
