"""The modules that an artifact's layers go into: a skeleton becomes a packed or a layered model."""

from collections.abc import Sequence

from torch import Tensor, nn

from plyweight.artifact import Header, LayeredWeight
from plyweight.artifact.names import (
    GRAPH_NAME,
    gain_name,
    is_output,
    is_pad,
    planes_name,
    roles_of,
    scale_name,
    split_name,
)
from plyweight.codec import from_planes, inner_levels, spread
from plyweight.errors import LayeringError, ModelMismatchError
from plyweight.kernels import Mode
from plyweight.loading.held import Views, tensor_of
from plyweight.nn.kernel_weight import choose, require_kernel
from plyweight.nn.norm import BATCH_NORM_TENSORS, SHARED
from plyweight.nn.outputs import round_output
from plyweight.nn.packed import PackedLinear, PackedWeight
from plyweight.nn.quantized import BiasByBitWidth
from plyweight.nn.skeleton import Skeleton
from plyweight.nn.swap import BATCH_NORMS, LAYERED, PACKED
from plyweight.quantizers import ActivationQuantizer, WeightQuantizer

__all__ = ["give_rows", "place_layered", "place_outputs", "place_packed", "plain_shapes"]


def plain_shapes(header: Header) -> dict[str, tuple[int, ...]]:
    """The shapes of the plain tensors by name: parameters and buffers that are not layered."""
    reserved = roles_of(header.weights, header.activations)
    shapes = {}
    for entry in header.tensors_of(0):
        if not is_pad(entry.name):
            _, name = split_name(entry.name)
            if name not in reserved and name != GRAPH_NAME:
                shapes[name] = entry.shape
    return shapes


def place_packed(
    skeleton: Skeleton, header: Header, base: Views, *, kernel: str, mode: Mode
) -> None:
    """Turn the modules of layered weights into packed ones that hold no plane yet.

    Raises:
        KernelError: If ``kernel`` cannot compute with the weight of a linear module.
        ModelMismatchError: If the model has other modules there.
    """
    for param, record in header.weights.items():
        packed = PackedWeight(
            record.shape,
            tensor_of(base[scale_name(param)]).to(skeleton.device),
            header.bit_widths,
            dtype=skeleton.tensor(param).dtype,
            group_size=record.group_size,
            pinned=record.pinned or 0,
        )
        for name, module in _users(skeleton, param):
            inputs = _input_quantizer(skeleton, header, name, record, header.bit_widths)
            PACKED[type(module)].from_float(module, packed, inputs)
            if isinstance(module, PackedLinear):
                require_kernel(packed, kernel, mode)
                choose(packed, kernel, mode)
    _check_activations(skeleton.model, header)


def place_layered(
    skeleton: Skeleton, header: Header, layers: Sequence[Views], held: tuple[int, ...]
) -> None:
    """Turn the modules of layered weights into ones with latent weights, at the bits held."""
    for param, record in header.weights.items():
        scale = tensor_of(layers[0][scale_name(param)])
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
                gains[record.width_at(bit_width)] = tensor_of(views[gain_name(param)])
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
    brought = [tensor_of(v[planes_name(param)]) for v in layers if planes_name(param) in v]
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


def place_outputs(skeleton: Skeleton, header: Header, bit_widths: tuple[int, ...]) -> None:
    """Let the modules whose outputs the header says are rounded do so; the steps come later.

    Raises:
        ModelMismatchError: If one is not there.
    """
    for name, activation in header.activations.items():
        if not is_output(name):
            continue
        quantizer = ActivationQuantizer(activation.bit_widths, bit_widths, device=skeleton.device)
        quantizer.set_kind(activation.kind)
        try:
            round_output(skeleton.model.get_submodule(name.rpartition(".")[0]), quantizer)
        except (AttributeError, LayeringError) as error:
            raise ModelMismatchError(
                artifact_only=[f"a quantized output, {name}"], model_only=[]
            ) from error


def _check_activations(model: nn.Module, header: Header) -> None:
    for name in header.activations:
        if is_output(name):
            continue
        try:
            quantizer = getattr(model.get_submodule(name), "input_quantizer", None)
        except AttributeError:
            quantizer = None
        if not isinstance(quantizer, ActivationQuantizer):
            raise ModelMismatchError(
                artifact_only=[f"a quantized input of {name or 'the model'}"], model_only=[]
            )


def give_rows(model: nn.Module, header: Header, bit_widths: tuple[int, ...]) -> None:
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
