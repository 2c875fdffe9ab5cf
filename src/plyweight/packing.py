"""pack: a trained model becomes one artifact.

Everything is read from the state dict, which carries what :func:`plyweight.prepare` knew, so a
model and a checkpoint of it make the same file:

    <param>                          latent weight      -> planes, by significance
    <module>.weight_quantizer.*      clip, gain, groups -> scale, gains
    <module>.input_quantizer.*       clip, offset       -> steps, zero points
    <module>.{running_mean, ...}     rows by bit-width  -> a row in the layer of its bit-width
    everything else                                     -> the base layer, as it is
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from plyweight.artifact import (
    Activation,
    LayerContent,
    LayeredWeight,
    ModelInfo,
    Receipt,
    TensorData,
    open_source,
    receipt,
    write_artifact,
)
from plyweight.artifact.names import (
    gain_name,
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

__all__ = ["DTYPES", "pack"]

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def pack(
    model: nn.Module | Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    revision: int = 0,
    license: str | None = None,
    evaluation: Mapping[int, Mapping[str, str]] | None = None,
) -> Receipt:
    """Write ``model`` as one artifact; every stored bit-width is a prefix of the file.

    The same weights make the same bytes. The file appears whole or not at all.

    Args:
        model: what :func:`plyweight.prepare` returned, trained; or its ``state_dict()``.
        path: of the file to write.
        name: of the model, for people; its class name by default.
        revision: counts up with every publication under that name.
        license: an identifier such as "Apache-2.0".
        evaluation: metrics by bit-width, decimal strings: ``{4: {"accuracy": "0.981"}}``.

    Returns:
        What is in the file and what it costs, read back from it.

    Raises:
        LayeringError: If the model is not layered, a weight is not finite, an activation
            quantizer has not seen a batch, or a tensor's dtype cannot be stored.
        OutputError: If the file cannot be written.
    """
    if isinstance(model, nn.Module):
        model = _unwrapped(model)
        state: Mapping[str, Tensor] = model.state_dict()
        default_name = type(model).__name__
    else:
        state, default_name = model, "model"
    contents = _Contents.of(state)
    write_artifact(
        path,
        layers=[contents.layer(i) for i in range(len(contents.bit_widths))],
        weights={p: weight.record for p, weight in contents.weights.items()},
        activations={m: _activation(q) for m, q in contents.activations.items()},
        model=ModelInfo(
            name=name or default_name,
            revision=revision,
            created_by=f"plyweight {version('plyweight')}",
            license=license,
            config_sha256=None,
        ),
        evaluation=evaluation,
    )
    return receipt(open_source(path))


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
        return to_planes(codes.numpy(), stop)[start:].tobytes()

    def gain_at(self, own_bit_width: int) -> Tensor | None:
        """float32 ``(1,)`` or the scale's shape; None where it is 1."""
        gain = self.gain[self.own_bit_widths.index(own_bit_width)]
        return None if bool((gain == 1).all()) else gain.reshape(gain.shape or (1,))


@dataclass
class _Contents:
    """A state dict, sorted by what its tensors are, each in the order of the state dict."""

    bit_widths: tuple[int, ...]
    weights: dict[str, _Weight] = field(default_factory=dict)
    activations: dict[str, ActivationQuantizer] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)  # (bit-widths, ...) each
    plain: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> "_Contents":
        state = _checked(state)
        owners = [k.removesuffix("model_bit_widths") for k in state if _is(k, "model_bit_widths")]
        widths = {tuple(state[f"{owner}model_bit_widths"].tolist()) for owner in owners}
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
            identity = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            if tensor.numel() and stored.setdefault(identity, key) != key:
                continue  # tied to one that is stored already
            if head.endswith("input_quantizer") and f"{module}kind_index" in state:
                if leaf == "clip":
                    owner = head.removesuffix("input_quantizer").rstrip(".")
                    contents.activations[owner] = _restored(state, module, owner)
                continue
            if f"{module}model_bit_widths" in state:
                if leaf in BATCH_NORM_TENSORS:
                    contents.rows[key] = tensor
                continue
            if leaf == "weight" and f"{module}weight_quantizer.clip" in state:
                contents.weights[key] = _weight(state, module, key)
            else:
                contents.plain[key] = tensor
        return contents

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
    part = {n: state[f"{module}weight_quantizer.{n}"].detach().cpu() for n in _WEIGHT_STATE}
    for name, tensor in (
        (key, latent),
        (f"{module}weight_quantizer.clip", part["clip"]),
        (f"{module}weight_quantizer.gain", part["gain"]),
    ):
        num_bad = int((~tensor.isfinite()).sum())
        if num_bad:
            raise LayeringError(
                f"{name} has {num_bad} values that are NaN or infinite; go back to a checkpoint "
                "from before the training diverged."
            )
    pinned = int(part["pinned"])
    own = tuple(sorted({max(b, pinned) for b in part["model_bit_widths"].tolist()}))
    record = LayeredWeight(
        shape=tuple(latent.shape),
        group_size=int(part["group_size"]) or None,
        pinned=pinned or None,
    )
    return _Weight(record, own, latent, scale_of(part["clip"]), part["gain"].float())


_WEIGHT_STATE = ("clip", "gain", "model_bit_widths", "pinned", "group_size")


def _restored(state: Mapping[str, Tensor], prefix: str, owner: str) -> ActivationQuantizer:
    """The activation quantizer whose state stands under ``prefix``."""
    part = {k.removeprefix(prefix): t.cpu() for k, t in state.items() if k.startswith(prefix)}
    pinned = int(part["pinned"])
    bit_widths = part["model_bit_widths"].tolist()
    own = sorted({max(b, pinned) for b in bit_widths})
    widths = dict(zip(own, part["widths"].tolist(), strict=True))
    quantizer = ActivationQuantizer(widths, bit_widths, pinned=pinned)
    quantizer.load_state_dict(part)
    if quantizer.kind == "unset":
        raise LayeringError(
            f"the input of {owner or 'the model'} has not seen a batch, so its step is not known; "
            "run the model (or train it) before it is packed."
        )
    return quantizer


def _activation(quantizer: ActivationQuantizer) -> Activation:
    widths = dict(zip(quantizer.own_bit_widths, quantizer.widths.tolist(), strict=True))
    return Activation(kind=quantizer.kind, bit_widths=widths)  # type: ignore[arg-type]


def _tensor_data(name: str, tensor: Tensor) -> TensorData:
    if tensor.dtype not in _NAMES:
        raise LayeringError(
            f"{name} is {tensor.dtype}, which an artifact cannot store; "
            f"convert it to one of {listed(_NAMES, most=20)}."
        )
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return TensorData(name, _NAMES[tensor.dtype], tuple(tensor.shape), raw.tobytes())


def _checked(state: Mapping[str, Any]) -> dict[str, Tensor]:
    if not isinstance(state, Mapping):
        raise LayeringError(f"a {type(state).__name__} was given; pack a module or a state dict.")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise LayeringError(
                f"entry {key!r} is a {type(value).__name__}; pack a flat state dict of tensors, "
                "as model.state_dict() gives it."
            )
    # What torch.compile puts before every name.
    return {key.replace("_orig_mod.", ""): tensor for key, tensor in state.items()}


def _is(key: str, ending: str) -> bool:
    """Whether ``key`` is ``ending``, alone or after a dot."""
    return f".{key}".endswith(f".{ending}")


def _unwrapped(model: nn.Module) -> nn.Module:
    """``model`` without the wrappers of torch.compile and data parallelism."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(
            model, (nn.DataParallel, nn.parallel.DistributedDataParallel)
        ):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner
