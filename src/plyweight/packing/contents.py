"""Contents: a state dict, sorted into what the layers of an artifact hold.

Everything is read from the state dict, which carries what :func:`plyweight.prepare` knew, so a
model and a checkpoint of it make the same file:

    <param>                          latent weight      -> planes, by significance
    <module>.weight_quantizer.*      clip, gain, groups -> scale, gains
    <module>.input_quantizer.*       clip, offset       -> steps, zero points
    <module>.output_quantizer.*      the same
    <module>.{running_mean, ...}     rows by bit-width  -> a row in the layer of its bit-width
    <module>.bias                    the same, where calibration gave it rows
    everything else                                     -> the base layer, as it is
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from plyweight.artifact import Activation, LayerContent, LayeredWeight, TensorData
from plyweight.artifact.names import (
    gain_name,
    is_output,
    planes_name,
    scale_name,
    step_name,
    zero_point_name,
)
from plyweight.codec import codes_at, encode, spread, to_planes
from plyweight.errors import LayeringError, listed
from plyweight.nn.norm import BATCH_COUNT, BATCH_NORM_TENSORS
from plyweight.quantizers import ActivationQuantizer
from plyweight.quantizers.weight import scale_of

__all__ = ["Contents", "checked_state"]

_DTYPE_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
# What the state dicts of the quantizers hold.
_WEIGHT_STATE = ("clip", "gain", "model_bit_widths", "pinned", "group_size")
_ACTIVATION_STATE = ("clip", "offset", "model_bit_widths", "pinned", "widths", "kind_index")


@dataclass
class _Weight:
    """One layered weight, ready to be cut into planes."""

    record: LayeredWeight
    own_bit_widths: tuple[int, ...]
    latent: Tensor
    scale: Tensor
    gain: Tensor  # (own bit-widths,) or (own bit-widths, *scale.shape)

    def planes(self, start: int, stop: int) -> bytes:
        """Planes ``start`` to ``stop`` (left out), row after row."""
        scale = spread(self.scale, self.record.shape, self.record.group_size)
        codes = codes_at(encode(self.latent, scale), stop)
        lowest = codes & (1 << (stop - start)) - 1  # the planes before are of other layers
        return to_planes(lowest.numpy(), stop - start).tobytes()

    def gain_at(self, own_bit_width: int) -> Tensor | None:
        """float32 ``(1,)`` or the scale's shape; None where it is 1."""
        gain = self.gain[self.own_bit_widths.index(own_bit_width)]
        return None if bool((gain == 1).all()) else gain.reshape(gain.shape or (1,))


@dataclass
class Contents:
    """A state dict, sorted by what its tensors are, each in the order of the state dict."""

    bit_widths: tuple[int, ...]
    weights: dict[str, _Weight] = field(default_factory=dict)
    activations: dict[str, ActivationQuantizer] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)  # (bit-widths, ...) each
    plain: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, state: Mapping[str, Tensor], *, by_object: bool) -> "Contents":
        """Sort ``state``; tied tensors are known by object, or by the memory that they share.

        Raises:
            LayeringError: If it is not of a prepared model, or cannot be stored.
        """
        owners = [k.removesuffix("model_bit_widths") for k in state if _is(k, "model_bit_widths")]
        widths = {tuple(state[f"{owner}model_bit_widths"].tolist()) for owner in owners}
        if any(_is(key, "packed_weight.scale") for key in state):
            raise LayeringError(
                "the model is in packed form, which has no latent weights; load it with "
                "form='fake-quantized' to pack it again."
            )
        if len(widths) != 1 or not any(_is(key, "weight_quantizer.clip") for key in state):
            found = f"bit-widths {listed(sorted(widths))}" if widths else "no bit-widths"
            raise LayeringError(
                f"the state dict has {found}, so it is not of a model from plyweight.prepare; "
                "pack a prepared model, or its state_dict()."
            )
        contents = cls(widths.pop())
        stored: dict[object, str] = {}
        for key, tensor in state.items():
            head, _, leaf = key.rpartition(".")
            module = f"{head}." if head else ""
            if leaf == BATCH_COUNT:
                continue
            if tensor.numel() and stored.setdefault(_identity(tensor, by_object), key) != key:
                continue  # tied to one that is stored already
            if f"{module}kind_index" in state:
                if leaf == "clip":
                    # The quantizer of an output goes by its own name.
                    owner = head.removesuffix("input_quantizer").rstrip(".")
                    if owner != head and is_output(owner):
                        raise LayeringError(
                            f"the layered module {owner} has a name by which artifacts mean what "
                            "another module gives; call it something else."
                        )
                    with _naming(module):
                        contents.activations[owner] = _restored(state, module, owner)
                continue
            if f"{module}model_bit_widths" in state:
                if leaf in BATCH_NORM_TENSORS:
                    contents.rows[key] = _checked_rows(key, tensor, len(contents.bit_widths))
                continue
            if leaf == "weight" and f"{module}weight_quantizer.clip" in state:
                with _naming(f"{module}weight_quantizer."):
                    contents.weights[key] = _weight(state, module, key)
            elif leaf == "bias" and tensor.dim() == 2 and f"{module}weight_quantizer.clip" in state:
                contents.rows[key] = _checked_rows(key, tensor, len(contents.bit_widths))
            else:
                contents.plain[key] = tensor
        return contents

    def records(self) -> tuple[dict[str, LayeredWeight], dict[str, Activation]]:
        """What the header says of weights and of activations, by name."""
        weights = {param: weight.record for param, weight in self.weights.items()}
        activations = {}
        for module, quantizer in self.activations.items():
            widths = dict(zip(quantizer.own_bit_widths, quantizer.widths.tolist(), strict=True))
            activations[module] = Activation(kind=quantizer.kind, bit_widths=widths)  # type: ignore[arg-type]
        return weights, activations

    def layer(self, index: int) -> LayerContent:
        """What layer ``index`` holds: what its bit-width adds to the one before."""
        bit_width = self.bit_widths[index]
        before = self.bit_widths[index - 1] if index else 0
        tensors = [t for p, w in self.weights.items() for t in _of_weight(p, w, bit_width, before)]
        for module, quantizer in self.activations.items():
            tensors += _of_activation(module, quantizer, bit_width, before)
        tensors += [_tensor_data(key, rows[index]) for key, rows in self.rows.items()]
        if index == 0:
            tensors += [_tensor_data(key, tensor) for key, tensor in self.plain.items()]
        return LayerContent(bit_width, tuple(tensors))


def _of_weight(param: str, weight: _Weight, bit_width: int, before: int) -> Iterator[TensorData]:
    own = weight.record.width_at(bit_width)
    own_before = weight.record.width_at(before) if before else 0
    if own == own_before:
        return
    yield TensorData(
        planes_name(param),
        "U8",
        (own - own_before, weight.record.plane_bytes),
        lambda: weight.planes(own_before, own),
    )
    if not before:
        yield _tensor_data(scale_name(param), weight.scale)
    gain = weight.gain_at(own)
    if gain is not None:
        yield _tensor_data(gain_name(param), gain)


def _of_activation(
    module: str, quantizer: ActivationQuantizer, bit_width: int, before: int
) -> Iterator[TensorData]:
    pinned = int(quantizer.pinned)
    own = max(bit_width, pinned)
    if before and own == max(before, pinned):
        return
    row = quantizer.own_bit_widths.index(own)
    yield _tensor_data(step_name(module), quantizer.steps[row].detach().reshape(1))
    if quantizer.kind == "offset":
        yield _tensor_data(zero_point_name(module), quantizer.zero_points[row].detach().reshape(1))


def _weight(state: Mapping[str, Tensor], module: str, key: str) -> _Weight:
    latent = state[key].detach().cpu()
    _check_finite(key, latent)
    part = _part(state, f"{module}weight_quantizer.", _WEIGHT_STATE)
    pinned = int(part["pinned"])
    record = LayeredWeight(
        shape=tuple(latent.shape),
        group_size=int(part["group_size"]) or None,
        pinned=pinned or None,
    )
    own, gain = _own_bit_widths(part), part["gain"].float()
    if len(gain) != len(own) or not part["clip"].is_floating_point():
        raise ValueError(f"{len(gain)} gains for {len(own)} bit-widths, clips {part['clip'].dtype}")
    return _Weight(record, own, latent, scale_of(part["clip"]), gain)


def _restored(state: Mapping[str, Tensor], prefix: str, owner: str) -> ActivationQuantizer:
    """The activation quantizer whose state stands under ``prefix``."""
    part = _part(state, prefix, _ACTIVATION_STATE)
    pinned = int(part["pinned"])
    bit_widths = part["model_bit_widths"].tolist()
    widths = dict(zip(_own_bit_widths(part), part["widths"].tolist(), strict=True))
    quantizer = ActivationQuantizer(widths, bit_widths, pinned=pinned)
    quantizer.load_state_dict(part)
    if quantizer.kind == "unset":
        raise LayeringError(
            f"the input of {owner or 'the model'} has not seen a batch, so its step is not known; "
            "run the model (or train it) before it is packed, or name it in `exclude` of prepare."
        )
    return quantizer


def _part(state: Mapping[str, Tensor], prefix: str, names: Sequence[str]) -> dict[str, Tensor]:
    """What stands under ``prefix``, on the CPU."""
    for name in names:
        if prefix + name not in state:
            raise LayeringError(
                f"the state dict has no {prefix}{name}, which a prepared model has; "
                "pack a whole state dict."
            )
        _check_finite(prefix + name, state[prefix + name])
    return {name: state[prefix + name].detach().cpu() for name in names}


@contextlib.contextmanager
def _naming(prefix: str) -> Iterator[None]:
    """Say in one sentence where a state dict is not what a prepared model's would be."""
    try:
        yield
    except LayeringError:
        raise
    except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise LayeringError(
            f"what stands under {prefix} in the state dict is not what a prepared model has there "
            f"({str(error).splitlines()[0]}); pack a state dict that nobody changed."
        ) from error


def _identity(tensor: Tensor, by_object: bool) -> object:
    """Equal for tied tensors: the same object in a model, the same memory in a state dict."""
    if by_object:
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _checked_rows(name: str, rows: Tensor, num_rows: int) -> Tensor:
    """What a batch norm or a bias has for each bit-width."""
    if rows.dim() != 2 or len(rows) != num_rows:
        raise LayeringError(
            f"{name} has shape {tuple(rows.shape)}, but needs a row for each of {num_rows} "
            "bit-widths; pack a state dict that nobody changed."
        )
    _check_finite(name, rows)
    return rows


def _own_bit_widths(part: Mapping[str, Tensor]) -> tuple[int, ...]:
    """The bit-widths that a quantizer takes, ascending."""
    pinned = int(part["pinned"])
    return tuple(sorted({max(b, pinned) for b in part["model_bit_widths"].tolist()}))


def _check_finite(name: str, tensor: Tensor) -> None:
    num_bad = int((~tensor.isfinite()).sum())
    if num_bad:
        raise LayeringError(
            f"{name} has {num_bad} values that are NaN or infinite; go back to a checkpoint "
            "from before the training diverged."
        )


def _tensor_data(name: str, tensor: Tensor) -> TensorData:
    if tensor.dtype not in _DTYPE_NAMES:
        raise LayeringError(
            f"{name} is {tensor.dtype}, which an artifact cannot store; "
            f"convert it to one of {listed(_DTYPE_NAMES, most=20)}."
        )
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    raw = flat.view(torch.uint8).numpy()  # the same memory: a large tensor is not copied
    return TensorData(name, _DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), raw)


def checked_state(model: object) -> dict[str, Tensor]:
    """The state dict of ``model``, or ``model`` if it is one already."""
    # The parameters themselves, so that tied ones are known by identity.
    state = model.state_dict(keep_vars=True) if isinstance(model, nn.Module) else model
    if not isinstance(state, Mapping):
        raise LayeringError(f"a {type(state).__name__} was given; pack a module or a state dict.")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise LayeringError(
                f"entry {key!r} is a {type(value).__name__}; pack a flat state dict of tensors, "
                "as model.state_dict() gives it."
            )
        if value.is_meta or value.layout is not torch.strided:
            raise LayeringError(
                f"{key} is on device {value.device} with layout {value.layout}, so it has no plain "
                "values to store; pack dense tensors on a real device."
            )
    # What torch.compile puts before every name.
    return {key.replace("_orig_mod.", ""): tensor for key, tensor in state.items()}


def _is(key: str, ending: str) -> bool:
    """Whether ``key`` is ``ending``, alone or after a dot."""
    return f".{key}".endswith(f".{ending}")
