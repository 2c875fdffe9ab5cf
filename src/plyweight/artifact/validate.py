"""Validate: what the fields of a header say about each other.

Integers only, and no byte of data: a header that passes describes tensors that tile the file
without holes or overlaps, and exactly the planes, scales and steps that its weights and
activations need in every layer.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from plyweight.artifact.layout import Alignment
from plyweight.artifact.names import (
    GRAPH_NAME,
    Role,
    is_output,
    is_pad,
    planes_name,
    roles_of,
    scale_name,
    split_name,
    step_name,
    zero_point_name,
)
from plyweight.artifact.records import Activation, Layer, LayeredWeight, TensorEntry
from plyweight.artifact.strict_json import header_error, shown

__all__ = ["validate"]


def validate(
    tensors: Sequence[TensorEntry],
    layers: Sequence[Layer],
    *,
    alignment: Alignment,
    weights: Mapping[str, LayeredWeight],
    activations: Mapping[str, Activation],
) -> None:
    """Check the fields of a header against each other.

    Raises:
        HeaderError: If two of them disagree.
    """
    _check_tiling(tensors, alignment)
    _check_layer_ends(tensors, layers, alignment)
    _check_activation_widths(layers, weights, activations)
    contents = _Contents(
        [layer.bit_width for layer in layers],
        weights,
        activations,
        roles_of(weights, activations),
        [{} for _ in layers],
    )
    for index, name, entry in _by_layer(tensors, layers):
        contents.add(index, name, entry)
    contents.check_complete()


def _check_tiling(tensors: Sequence[TensorEntry], alignment: Alignment) -> None:
    """Every tensor starts where the one before it stops; padding only fills gaps."""
    offset, after_pad = 0, False
    for entry in tensors:
        start, stop = entry.byte_range.start, entry.byte_range.stop
        what = f"tensor {entry.name!r}"
        if start != offset:
            raise header_error(
                f"{what} starts at byte {start}", f"the one before it stops at {offset}"
            )
        pad = is_pad(entry.name)
        if pad and (
            entry.dtype != "U8"
            or len(entry.shape) != 1
            or after_pad
            or not 0 < stop - start < alignment.layer
        ):
            raise header_error(
                f"{what} is {entry.dtype} of shape {list(entry.shape)}",
                f"padding is one run of 1 to {alignment.layer - 1} U8",
            )
        if not pad and start % alignment.tensor:
            raise header_error(
                f"{what} starts at byte {start}",
                f"tensors start at multiples of {alignment.tensor}",
            )
        offset, after_pad = stop, pad


def _check_layer_ends(
    tensors: Sequence[TensorEntry], layers: Sequence[Layer], alignment: Alignment
) -> None:
    """Every layer ends where a tensor does, and the last one where the last tensor does."""
    data_start = layers[0].byte_range.start
    ends = {entry.byte_range.stop for entry in tensors}
    for index, layer in enumerate(layers):
        if layer.byte_range.num_bytes % alignment.layer:
            raise header_error(
                f"layer {index} has {layer.byte_range.num_bytes} bytes",
                f"layers are multiples of {alignment.layer} bytes",
            )
        if layer.byte_range.stop - data_start not in ends:
            raise header_error(
                f"layer {index} ends at byte {layer.byte_range.stop - data_start} of the data",
                "no tensor ends there",
            )
    last = tensors[-1].byte_range.stop
    if last != layers[-1].byte_range.stop - data_start:
        raise header_error(
            f"the tensors have {last} bytes",
            f"the layers have {layers[-1].byte_range.stop - data_start}",
        )


def _check_activation_widths(
    layers: Sequence[Layer],
    weights: Mapping[str, LayeredWeight],
    activations: Mapping[str, Activation],
) -> None:
    """A module with a layered ``weight`` has an activation width at each of the weight's own."""
    for module, activation in activations.items():
        weight = weights.get(f"{module}.weight" if module else "weight")
        if is_output(module):
            own = {layer.bit_width for layer in layers}
        elif weight is not None:
            own = {weight.width_at(layer.bit_width) for layer in layers}
        else:
            continue  # a module that borrows its weight; what is there cannot be told by name
        if set(activation.bit_widths) != own:
            raise header_error(
                f"the activation of {shown(module)} has widths for {sorted(activation.bit_widths)}",
                f"{'the model' if is_output(module) else 'its weight'} has {sorted(own)} bits",
            )


def _by_layer(
    tensors: Sequence[TensorEntry], layers: Sequence[Layer]
) -> Iterator[tuple[int, str, TensorEntry]]:
    """Every tensor that is no padding, with its layer and its name inside it."""
    current = 0
    insides = [layer.byte_range.shifted(-layers[0].byte_range.start) for layer in layers]
    for entry in tensors:
        if is_pad(entry.name):
            continue
        index, name = split_name(entry.name)
        if index < current:
            raise header_error(
                f"tensor {shown(entry.name)} comes after one of layer {current}",
                "layers follow each other",
            )
        current = index
        if index >= len(layers):
            raise header_error(
                f"tensor {shown(entry.name)} is of layer {index}", f"there are {len(layers)} layers"
            )
        inside, here = insides[index], entry.byte_range
        if not inside.start <= here.start <= here.stop <= inside.stop:
            raise header_error(
                f"tensor {shown(entry.name)} has bytes {here} of the data",
                f"layer {index} has {inside}",
            )
        yield index, name, entry


@dataclass(frozen=True)
class _Contents:
    """The tensors of each layer, and what they must be."""

    bit_widths: Sequence[int]
    weights: Mapping[str, LayeredWeight]
    activations: Mapping[str, Activation]
    roles: Mapping[str, Role]
    layers: Sequence[dict[str, TensorEntry]]

    def add(self, index: int, name: str, entry: TensorEntry) -> None:
        role = self.roles.get(name)
        if role is None:
            self._check_plain(index, name, entry)
        elif role.kind == "planes":
            num_planes = self._planes_in(self.weights[role.owner], index)
            if not num_planes:
                raise _does_not_belong(entry, "its weight gets no planes in that layer")
            weight = self.weights[role.owner]
            _require(entry, "U8", [(num_planes, weight.plane_bytes)])
        elif role.kind == "scale":
            if index:
                raise _does_not_belong(entry, "a scale is in layer 0 only (later ones have gains)")
            _require(entry, "F32", [self.weights[role.owner].scale_shape])
        elif role.kind == "gain":
            weight = self.weights[role.owner]
            if not self._planes_in(weight, index):
                raise _does_not_belong(entry, "its weight gets no new bit-width in that layer")
            _require(entry, "F32", [(1,), weight.scale_shape])
        else:
            kind = self.activations[role.owner].kind
            if role.kind == "zero_point" and kind != "offset":
                raise _does_not_belong(entry, f"an activation of kind {kind!r} has no zero point")
            _require(entry, "F32", [(1,)])
        self.layers[index][name] = entry

    def check_complete(self) -> None:
        """Nothing a reader needs is missing."""
        needed = [(0, scale_name(param)) for param in self.weights]
        for index in range(len(self.layers)):
            for param, weight in self.weights.items():
                if self._planes_in(weight, index):
                    needed.append((index, planes_name(param)))
        for module, activation in self.activations.items():
            needed.append((0, step_name(module)))
            if activation.kind == "offset":
                needed.append((0, zero_point_name(module)))
        for index, name in needed:
            if name not in self.layers[index]:
                raise header_error(
                    f"layer {index} ({self.bit_widths[index]} bits) lacks tensor {shown(name)}",
                    "layered.params and layered.activations need it",
                )

    def _planes_in(self, weight: LayeredWeight, index: int) -> int:
        previous = self.bit_widths[index - 1] if index else 0
        return weight.planes_in(self.bit_widths[index], previous)

    def _check_plain(self, index: int, name: str, entry: TensorEntry) -> None:
        if name in self.weights:
            raise _does_not_belong(entry, "layered.params says that weight is stored as planes")
        if name == GRAPH_NAME:
            if index or entry.dtype != "U8" or len(entry.shape) != 1:
                raise _does_not_belong(entry, "the graph is one run of U8 in layer 0")
        elif name.startswith("__"):
            raise _does_not_belong(entry, "names that start with '__' are reserved")
        elif index:
            first = self.layers[0].get(name)
            if first is None:
                raise _does_not_belong(entry, "a later layer only replaces tensors of layer 0")
            _require(entry, first.dtype, [first.shape])


def _require(entry: TensorEntry, dtype: str, shapes: Sequence[tuple[int, ...]]) -> None:
    if entry.dtype != dtype or entry.shape not in shapes:
        allowed = " or ".join(str(list(shape)) for shape in shapes)
        raise header_error(
            f"tensor {shown(entry.name)} is {entry.dtype} of shape {list(entry.shape)}",
            f"it must be {dtype} of shape {allowed}",
        )


def _does_not_belong(entry: TensorEntry, rule: str) -> Exception:
    return header_error(f"the file has a tensor {shown(entry.name)}", rule)
