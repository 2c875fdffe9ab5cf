"""GraphSkeleton: the float network inside of a layered one, exported once as an ONNX graph.

Every layered module becomes the plain torch module again that it was made from, every switchable
batch norm a plain one, and quantizers of activations are left out (those of outputs leave an
Identity where they were). Parameters keep their names,
so in the exported graph an initializer is called as in the state dict, and the graph stands for
all bit-widths. Which module a node comes from is in the metadata that the exporter writes.

The copy shares the parameters of the model: nothing is copied but rows of batch norms and biases.
"""

import contextlib
import copy
import logging
import re
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from plyweight.errors import LayeringError
from plyweight.nn.layered import (
    LayeredConv1d,
    LayeredConv2d,
    LayeredEmbedding,
    LayeredLinear,
    LayeredModule,
)
from plyweight.nn.norm import SwitchableBatchNorm1d, SwitchableBatchNorm2d
from plyweight.nn.outputs import OUTPUT_QUANTIZER, output_quantizers
from plyweight.nn.swap import unwrapped
from plyweight.quantizers import ActivationQuantizer, Switchable

__all__ = ["GraphSkeleton", "Layered"]

Kind = Literal["convolution", "linear", "embedding"]
_PLAIN: dict[type[nn.Module], tuple[type[nn.Module], Kind]] = {
    LayeredConv1d: (nn.Conv1d, "convolution"),
    LayeredConv2d: (nn.Conv2d, "convolution"),
    LayeredLinear: (nn.Linear, "linear"),
    LayeredEmbedding: (nn.Embedding, "embedding"),
}
_PLAIN_NORMS: dict[type[nn.Module], type[nn.Module]] = {
    SwitchableBatchNorm1d: nn.BatchNorm1d,
    SwitchableBatchNorm2d: nn.BatchNorm2d,
}


@dataclass(frozen=True)
class Layered:
    """A layered module, by the names that an artifact of the model has.

    Attributes:
        kind: of module.
        param: the layered weight, a key of ``layered.params``.
        bias: a plain tensor; None where there is none.
        activation: how its input is quantized, a key of ``layered.activations``; None if not.
    """

    kind: Kind
    param: str
    bias: str | None
    activation: str | None


class GraphSkeleton:
    """The float network of a layered model, in evaluation mode.

    Attributes:
        model: a copy of it.
        bit_widths: of the layered model, ascending.
        layered: its layered modules, by every name they have.
        stored: the artifact's name of each tensor, by every name it has in a state dict.
        shapes: of these tensors in the layered model, by the same names.
        group_sizes: inputs that share a scale, by layered weight; None for one per output channel.
        quantizers: those of activations, by key of ``layered.activations``.
        outputs: keys of those that round outputs, by the name they are called by.
    """

    def __init__(self, model: nn.Module) -> None:
        """Take ``model`` apart; it is not changed.

        Raises:
            LayeringError: If it computes in another type than float32.
        """
        model = unwrapped(model)
        state = {
            key.replace("_orig_mod.", ""): tensor
            for key, tensor in model.state_dict(keep_vars=True).items()
        }
        first: dict[int, str] = {}
        for key, tensor in state.items():
            _check_float32(key, tensor)
            first.setdefault(id(tensor), key)  # tied tensors are stored under their first name
        self.stored = {key: first[id(tensor)] for key, tensor in state.items()}
        self.shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
        self.group_sizes: dict[str, int | None] = {}
        self.layered: dict[str, Layered] = {}
        self.quantizers: dict[str, ActivationQuantizer] = {}
        self.outputs: dict[str, str] = {}
        widths: set[tuple[int, ...]] = set()
        for name, module in model.named_modules(remove_duplicate=False):
            if isinstance(module, Switchable):
                widths.add(tuple(module.model_bit_widths.tolist()))
            if isinstance(module, LayeredModule):
                self._add(name.replace("_orig_mod.", ""), module, first)
        for key, quantizer in output_quantizers(model).items():
            self._add_output(key.replace("_orig_mod.", ""), quantizer, first)
        (self.bit_widths,) = widths
        self.model = _plain_copy(model)

    def _add(self, name: str, module: LayeredModule, first: Mapping[int, str]) -> None:
        bias, inputs = module._parameters.get("bias"), module.input_quantizer
        activation = None
        if isinstance(inputs, ActivationQuantizer):
            key = first[id(inputs.clip)]
            activation = key.removesuffix("input_quantizer.clip").rstrip(".")
            self.quantizers[activation] = inputs
        param, weights = first[id(module.latent_weight)], module.weight_quantizer
        has_groups = weights.clip.shape[1:].numel() > 1
        self.group_sizes[param] = int(weights.group_size) if has_groups else None
        self.layered[name] = Layered(
            kind=_PLAIN[type(module)][1],
            param=param,
            bias=None if bias is None else first[id(bias)],
            activation=activation,
        )

    def _add_output(
        self, name: str, quantizer: ActivationQuantizer, first: Mapping[int, str]
    ) -> None:
        key = first[id(quantizer.clip)].removesuffix(".clip")
        self.quantizers[key] = quantizer
        self.outputs[name] = key

    def export(
        self, inputs: tuple[Any, ...], dynamic_shapes: Sequence[Mapping[int, Any] | None]
    ) -> Any:
        """The network as an ``onnx_ir.Model``, not optimized.

        Args:
            inputs: arguments of its forward, tensors.
            dynamic_shapes: for each of them, its dimensions that may have any length.

        Raises:
            LayeringError: If it cannot be exported; it names module and operator.
        """
        with torch.no_grad(), _quiet():
            try:
                program = torch.export.export(
                    self.model, inputs, dynamic_shapes=tuple(dynamic_shapes), strict=False
                )
            except Exception as error:  # whatever the model's own code raises under a trace
                raise LayeringError(
                    f"{self._place_of(error)} cannot be traced by torch.export: {_line(error)} "
                    "Pack without example_inputs to have an artifact without a graph."
                ) from error
            try:
                exported = torch.onnx.export(program, dynamo=True, optimize=False, verbose=False)
            except Exception as error:
                raise LayeringError(
                    f"{_unknown_operator(program, error)} cannot be exported to ONNX: "
                    f"{_line(error)} Pack without example_inputs to have an artifact without a "
                    "graph."
                ) from error
        assert exported is not None
        return exported.model

    def _place_of(self, error: BaseException) -> str:
        """The innermost module that was computing when ``error`` was raised."""
        names = {id(module): name for name, module in self.model.named_modules()}
        place = ""
        for frame, _ in traceback.walk_tb(error.__traceback__):
            place = names.get(id(frame.f_locals.get("self")), "") or place
        return f"module {place!r}" if place else f"this {type(self.model).__name__}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch says about its own code, and about a library that is not needed."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _plain_copy(model: nn.Module) -> nn.Module:
    shared = [*model.parameters(), *model.buffers()]
    plain: nn.Module = copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
    for module in list(plain.modules()):
        if isinstance(module._modules.get(OUTPUT_QUANTIZER), ActivationQuantizer):
            module._modules[OUTPUT_QUANTIZER] = _Place()
        if type(module) in _PLAIN:
            del module._modules["weight_quantizer"], module._modules["input_quantizer"]
            bias = module._parameters.get("bias")
            module.__class__ = _PLAIN[type(module)][0]
            if bias is not None and bias.dim() == 2:
                module._parameters["bias"] = nn.Parameter(bias[0].detach().clone())
        elif type(module) in _PLAIN_NORMS:
            _make_plain_norm(module)
    return plain.eval()


class _Place(nn.Module):
    """Where an output is rounded; the exporter makes an Identity of it that says so."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.clone()


def _make_plain_norm(module: nn.Module) -> None:
    for tensors in (module._parameters, module._buffers):
        for name, tensor in list(tensors.items()):
            if name in ("model_bit_widths", "pinned", "row", "model_row"):
                del tensors[name]
            elif tensor is not None:
                row = tensor[0].detach().clone()
                is_parameter = isinstance(tensor, nn.Parameter)
                tensors[name] = nn.Parameter(row) if is_parameter else row  # type: ignore[assignment]
    module.__class__ = _PLAIN_NORMS[type(module)]


def _check_float32(key: str, tensor: Tensor) -> None:
    if tensor.is_floating_point() and tensor.dtype != torch.float32:
        raise LayeringError(
            f"{key} is {tensor.dtype}, but a graph computes in float32; pack model.float(), or "
            "pack without example_inputs."
        )


def _unknown_operator(program: Any, error: BaseException) -> str:
    """The operator that ``error``, raised by torch.onnx, speaks of, and its module."""
    text = "".join(traceback.format_exception(error))
    found = re.search(r"call_function\[target=(?:torch\.ops\.)?([\w.]+)", text)
    if found is None:
        return "the network"
    operator = found.group(1)
    base = operator.split(".")[1] if "." in operator else operator
    # torch.onnx takes operators apart before, so this one may be called a little otherwise here.
    for node in program.graph.nodes:
        if node.op == "call_function" and base in f"{node.target}":
            places = list(node.meta.get("nn_module_stack", {}).values())
            place = places[-1][0] if places else ""
            return f"operator {operator} of module {place!r}"
    return f"operator {operator}"


def _line(error: BaseException) -> str:
    """The first line of what the first of ``error`` and its causes says, as a sentence."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[0].strip().rstrip(".") + "."
