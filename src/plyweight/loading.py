"""load, upgrade, downgrade: an artifact becomes a running torch model, and changes its width.

A loaded model holds layers 0 to k of its artifact. `load` reads those and not a byte beyond,
`upgrade` reads only the layers still missing and takes them once all are verified, `downgrade`
gives the planes above back.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from plyweight.artifact import ArtifactReader, Header, LayeredWeight, Source, TensorView
from plyweight.artifact.names import (
    GRAPH_NAME,
    gain_name,
    is_pad,
    planes_name,
    roles_of,
    scale_name,
    split_name,
    step_name,
    zero_point_name,
)
from plyweight.codec import from_planes, inner_levels, spread
from plyweight.errors import ArtifactError, BitWidthError, LayeringError, ModelMismatchError
from plyweight.nn.bit_width import set_bit_width
from plyweight.nn.norm import BATCH_NORM_TENSORS, SHARED
from plyweight.nn.packed import PackedModule, PackedWeight
from plyweight.nn.quantized import BiasByBitWidth
from plyweight.nn.skeleton import Skeleton
from plyweight.nn.swap import BATCH_NORMS, LAYERED, PACKED, unwrapped
from plyweight.quantizers import ActivationQuantizer, WeightQuantizer

__all__ = ["downgrade", "load", "upgrade"]

Form = Literal["packed", "fake-quantized"]
Views = Mapping[str, TensorView]  # what a layer holds, by name inside the layer


@torch.inference_mode(False)  # what is made inside could not be changed outside
def load(
    source: str | os.PathLike[str] | Source,
    model: nn.Module,
    *,
    bit_width: int | None = None,
    form: Form = "packed",
) -> nn.Module:
    """A copy of ``model`` with the weights of an artifact, in evaluation mode.

    Reads the header and the layers up to ``bit_width``, each verified before it is used. The
    result computes what the trained model computed at each bit-width: on the CPU and in the dtype
    it was trained in, bit for bit.

    Args:
        source: a file, whole or cut at the end of a layer.
        model: the float architecture, on the device and in the dtype to compute in; its weights
            are not used (it may be on the meta device) and it is not changed.
        bit_width: the widest to hold, and the one to compute at; None for all that is there.
        form: "packed": resident are the planes, for inference, :func:`upgrade` and
            :func:`downgrade`. "fake-quantized": resident are float latent weights, to go on
            training at the bit-widths held.

    Raises:
        BitWidthError: If that bit-width is not stored, or the file is cut before it.
        ArtifactError: If the file is damaged; the message names layer and tensor.
        ModelMismatchError: If the model is not that of the artifact; names are on both sides.
        LayeringError: If an argument is wrong, or the model has values that no artifact gives.
        SourceError: If the file cannot be read.
    """
    if form not in ("packed", "fake-quantized"):
        raise LayeringError(f"form is {form!r}; give 'packed' or 'fake-quantized'.")
    reader = ArtifactReader(source)
    header = reader.header
    target = reader.held_bit_widths[-1] if bit_width is None else bit_width
    num_layers = header.layer_index(target) + 1
    plain = _plain_shapes(header)
    weights = {param: record.shape for param, record in header.weights.items()}
    skeleton = Skeleton(model, frozenset(plain) | frozenset(weights))
    skeleton.check(weights | plain)
    layers = [reader.read_layer(i) for i in range(num_layers)]
    for name in plain:
        skeleton.set(name, _tensor(layers[0][name]))
    held = header.bit_widths[:num_layers]
    if form == "packed":
        _place_packed(skeleton, header, layers[0])
        _give_rows(skeleton.model, header, header.bit_widths)
        loaded = _Loaded(header, skeleton.model)
        for views in layers:
            loaded.apply(views)
        skeleton.model.requires_grad_(False)
        loaded.remember()
    else:
        _place_layered(skeleton, header, layers, held)
        _give_rows(skeleton.model, header, held)
        loaded = _Loaded(header, skeleton.model)
        for views in layers:
            loaded.apply_side_information(views)
    skeleton.check_complete()
    set_bit_width(skeleton.model, target)
    return skeleton.model.eval()


@torch.inference_mode(False)
def upgrade(
    model: nn.Module, source: str | os.PathLike[str] | Source, *, bit_width: int | None = None
) -> None:
    """Let ``model`` hold and compute at ``bit_width``: reads only the layers it lacks.

    Args:
        model: from :func:`load`, in packed form.
        source: of the same artifact.
        bit_width: None for the widest that the source holds. For one that the model holds
            already, nothing is read, and nothing is freed (see :func:`downgrade`).

    Raises:
        BitWidthError: If that bit-width is not stored, or the source is cut before it.
        ArtifactError: If the source is damaged or another artifact. The model stays as it was.
        LayeringError: If the model was not loaded in packed form.
    """
    loaded = _loaded(model)
    header, num_held = loaded.header, loaded.num_layers
    reader = ArtifactReader(source)
    if reader.header.artifact_id != header.artifact_id:
        raise ArtifactError(
            f"{reader.source.name} is artifact {reader.header.artifact_id[:12]}, but the model was "
            f"loaded from {header.artifact_id[:12]}; load the other one anew instead."
        )
    target = reader.held_bit_widths[-1] if bit_width is None else bit_width
    num_layers = header.layer_index(target) + 1
    layers = [reader.read_layer(i) for i in range(num_held, num_layers)]  # all, or none is taken
    try:
        for views in layers:
            loaded.apply(views)
    except BaseException:  # no memory, or interrupted
        loaded.release_to(num_held)
        raise
    loaded.remember()
    set_bit_width(loaded.model, target)


def downgrade(model: nn.Module, bit_width: int) -> None:
    """Let ``model`` compute at ``bit_width`` and give back the memory of the planes above.

    Raises:
        BitWidthError: If that bit-width is not held.
        LayeringError: If the model was not loaded in packed form.
    """
    loaded = _loaded(model)
    held = loaded.header.bit_widths[: loaded.num_layers]
    if type(bit_width) is not int or bit_width not in held:
        raise BitWidthError(
            bit_width, stored=held, where="the model", advice="Downgrade to one of those."
        )
    set_bit_width(loaded.model, bit_width)
    loaded.release_to(held.index(bit_width) + 1)
    loaded.remember()


@dataclass(frozen=True)
class _Record:
    """What a loaded model remembers: its artifact, and how many layers of it are held."""

    header: Header
    num_layers: int


class _Loaded:
    """A model that takes and gives back layers of an artifact, one after another."""

    def __init__(self, header: Header, model: nn.Module, num_layers: int = 0) -> None:
        self.header, self.model, self.num_layers = header, model, num_layers

    def remember(self) -> None:
        """Note on the model itself what it holds."""
        record = _Record(self.header, self.num_layers)
        self.model._plyweight_artifact = record  # type: ignore[assignment]

    def apply(self, views: Views) -> None:
        """Take the next layer: planes and side information."""
        device = next(iter(self._packed_weights().values())).scale.device
        for param, packed in self._packed_weights().items():
            planes, gain = views.get(planes_name(param)), views.get(gain_name(param))
            packed.hold(
                self.num_layers,
                None if planes is None else _tensor(planes, copy=False).to(device),
                None if gain is None else _tensor(gain).to(device),
            )
        self.apply_side_information(views)

    def apply_side_information(self, views: Views) -> None:
        """Take from the next layer what holds from its bit-width on.

        It holds until a later layer replaces it, so all the rows above take it too.
        """
        index = self.num_layers
        for module, quantizer in self._quantizers().items():
            step, zero_point = views.get(step_name(module)), views.get(zero_point_name(module))
            if step is None and zero_point is None:
                continue
            own = quantizer.own_bit_width(self.header.bit_widths[index])
            row = quantizer.own_bit_widths.index(own)
            held_step, held_zero = quantizer.steps[row], quantizer.zero_points[row]
            new_step = float(held_step.detach() if step is None else _tensor(step))
            new_zero = float(held_zero.detach() if zero_point is None else _tensor(zero_point))
            for bit_width in quantizer.available_bit_widths[index:]:
                quantizer.set_step(bit_width, new_step, new_zero)
        for name, tensor in self._rows().items():
            if name in views:
                with torch.no_grad():
                    tensor[index:] = _tensor(views[name]).to(tensor)
        self.num_layers += 1

    def release_to(self, num_layers: int) -> None:
        """Give back all but ``num_layers``. Steps and statistics are of no size, and stay."""
        for packed in self._packed_weights().values():
            while packed.num_held > num_layers:
                packed.release(packed.num_held - 1)
        self.num_layers = num_layers

    def _packed_weights(self) -> dict[str, PackedWeight]:
        found = {}
        for param in self.header.weights:
            module = self.model.get_submodule(param.rpartition(".")[0])
            assert isinstance(module, PackedModule)
            found[param] = module.packed_weight
        return found

    def _quantizers(self) -> dict[str, ActivationQuantizer]:
        found = {}
        for name in self.header.activations:
            quantizer = self.model.get_submodule(name).input_quantizer
            assert isinstance(quantizer, ActivationQuantizer)
            found[name] = quantizer
        return found

    def _rows(self) -> dict[str, Tensor]:
        """Tensors that have a row for each bit-width, by their name inside a layer."""
        switchable = tuple(BATCH_NORMS.values())
        rows: dict[str, Tensor] = {}
        for name, module in self.model.named_modules():
            prefix = f"{name}." if name else ""
            if isinstance(module, switchable):
                leaves: tuple[str, ...] = BATCH_NORM_TENSORS
            elif isinstance(module, BiasByBitWidth) and module.has_bias_rows:
                leaves = ("bias",)
            else:
                continue
            tensors = module._parameters | module._buffers
            rows |= {prefix + leaf: t for leaf in leaves if (t := tensors[leaf]) is not None}
        return rows


def _plain_shapes(header: Header) -> dict[str, tuple[int, ...]]:
    """The shapes of the plain tensors by name: parameters and buffers that are not layered."""
    reserved = roles_of(header.weights, header.activations)
    shapes = {}
    for entry in header.tensors_of(0):
        if not is_pad(entry.name):
            _, name = split_name(entry.name)
            if name not in reserved and name != GRAPH_NAME:
                shapes[name] = entry.shape
    return shapes


def _place_packed(skeleton: Skeleton, header: Header, base: Views) -> None:
    """Turn the modules of layered weights into packed ones that hold no plane yet."""
    for param, record in header.weights.items():
        packed = PackedWeight(
            record.shape,
            _tensor(base[scale_name(param)]).to(skeleton.device),
            header.bit_widths,
            dtype=skeleton.tensor(param).dtype,
            group_size=record.group_size,
            pinned=record.pinned or 0,
        )
        for name, module in _users(skeleton, param):
            inputs = _input_quantizer(skeleton, header, name, record, header.bit_widths)
            PACKED[type(module)].from_float(module, packed, inputs)
    _check_activations(skeleton.model, header)


def _place_layered(
    skeleton: Skeleton, header: Header, layers: Sequence[Views], held: tuple[int, ...]
) -> None:
    """Turn the modules of layered weights into ones with latent weights, at the bits held."""
    for param, record in header.weights.items():
        scale = _tensor(layers[0][scale_name(param)])
        latent = _latent(param, record, scale, layers, held[-1])
        old = skeleton.tensor(param)
        weight = nn.Parameter(
            latent.to(skeleton.device, old.dtype), requires_grad=old.requires_grad
        )
        quantizer = WeightQuantizer(
            weight, held, group_size=record.group_size, pinned=record.pinned or 0
        )
        gains = {}
        for views, bit_width in zip(layers, held, strict=True):
            if gain_name(param) in views:
                gains[record.width_at(bit_width)] = _tensor(views[gain_name(param)])
        quantizer.set_grid(scale, gains)
        for name, module in _users(skeleton, param):
            inputs = _input_quantizer(skeleton, header, name, record, held)
            module.weight = weight
            LAYERED[type(module)].from_float(module, quantizer, inputs)
    _check_activations(skeleton.model, header)


def _latent(
    param: str, record: LayeredWeight, scale: Tensor, layers: Sequence[Views], bit_width: int
) -> Tensor:
    """A float32 weight that encodes to the codes held."""
    brought = [_tensor(v[planes_name(param)]) for v in layers if planes_name(param) in v]
    codes = from_planes([row for planes in brought for row in planes], record.shape)
    steps = inner_levels(codes, record.width_at(bit_width))
    latent: Tensor = steps * spread(scale, record.shape, record.group_size)
    return latent


def _users(skeleton: Skeleton, param: str) -> list[tuple[str, nn.Module]]:
    """The modules whose weight is ``param``, with their names.

    Raises:
        ModelMismatchError: If one of them is not of a kind that can be layered.
    """
    users = []
    for slot in skeleton.slots(param):
        if type(slot.module) not in LAYERED or slot.leaf != "weight":
            raise ModelMismatchError(
                artifact_only=[f"{param} as a layered weight"],
                model_only=[f"{param} in a {type(slot.module).__name__}"],
            )
        users.append((slot.module_name, slot.module))
    return users


def _input_quantizer(
    skeleton: Skeleton,
    header: Header,
    module_name: str,
    record: LayeredWeight,
    bit_widths: tuple[int, ...],
) -> ActivationQuantizer | None:
    """The quantizer of a module's input, its steps not set yet; None if the input stays float."""
    activation = header.activations.get(module_name)
    if activation is None:
        return None
    quantizer = ActivationQuantizer(
        activation.bit_widths, bit_widths, pinned=record.pinned or 0, device=skeleton.device
    )
    quantizer.set_kind(activation.kind)
    return quantizer


def _check_activations(model: nn.Module, header: Header) -> None:
    for name in header.activations:
        try:
            quantizer = getattr(model.get_submodule(name), "input_quantizer", None)
        except AttributeError:
            quantizer = None
        if not isinstance(quantizer, ActivationQuantizer):
            raise ModelMismatchError(
                artifact_only=[f"a quantized input of {name or 'the model'}"], model_only=[]
            )


def _give_rows(model: nn.Module, header: Header, bit_widths: tuple[int, ...]) -> None:
    """Give every batch norm and bias that has tensors in later layers a row for each bit-width.

    Where there are no later layers nothing tells, and one row computes what a float one does. A
    batch norm that later layers do not change is marked as shared by all bit-widths.

    Raises:
        ModelMismatchError: If a later layer replaces what has no rows in the model.
    """
    reserved = roles_of(header.weights, header.activations)
    later = {
        name
        for index in range(1, len(header.layers))
        for entry in header.tensors_of(index)
        if not is_pad(entry.name) and (name := split_name(entry.name)[1]) not in reserved
    }
    for module_name, module in list(model.named_modules()):
        prefix = f"{module_name}." if module_name else ""
        if type(module) in BATCH_NORMS:
            own = later & {prefix + leaf for leaf in BATCH_NORM_TENSORS}
            if own or len(header.layers) == 1:
                BATCH_NORMS[type(module)].from_float(module, bit_widths)
            else:
                # Or excluded by the caller of prepare: in a file the two look alike.
                module.kept_float = SHARED
            later -= own
        elif isinstance(module, BiasByBitWidth) and f"{prefix}bias" in later:
            module.give_bias_rows()
            later.remove(f"{prefix}bias")
    if later:
        raise ModelMismatchError(
            artifact_only=[f"{name} by bit-width" for name in sorted(later)], model_only=[]
        )


def _loaded(model: nn.Module) -> _Loaded:
    """What :func:`load` made, compiled since or not."""
    model = unwrapped(model)
    record = getattr(model, "_plyweight_artifact", None)
    if not isinstance(record, _Record):
        raise LayeringError(
            f"this {type(model).__name__} holds no artifact; upgrade and downgrade take a model "
            "from plyweight.load(file, model) in packed form."
        )
    return _Loaded(record.header, model, record.num_layers)


def _tensor(view: TensorView, *, copy: bool = True) -> Tensor:
    """The tensor of ``view``; without ``copy`` it keeps the whole layer's buffer alive."""
    tensor = torch.from_numpy(view.numpy())
    if view.dtype == "BF16":
        tensor = tensor.view(torch.bfloat16)  # numpy has none, and gave its bits
    return tensor.clone() if copy else tensor
