"""What a loaded model holds of its artifact: layers 0 to k, taken and given back in this order."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from plyweight.artifact import Header, TensorView
from plyweight.artifact.names import gain_name, is_output, planes_name, step_name, zero_point_name
from plyweight.errors import BitWidthError, LayeringError
from plyweight.nn.bit_width import switch
from plyweight.nn.norm import BATCH_NORM_TENSORS
from plyweight.nn.packed import PackedModule, PackedWeight
from plyweight.nn.quantized import BiasByBitWidth
from plyweight.nn.swap import BATCH_NORMS, unwrapped
from plyweight.quantizers import ActivationQuantizer

__all__ = ["HeldLayers", "ReadyLayer", "Views", "tensor_of"]

Views = Mapping[str, TensorView]  # what a layer holds, by name inside the layer


def tensor_of(view: TensorView, *, copy: bool = True) -> Tensor:
    """The tensor of ``view``; without ``copy`` it keeps the whole layer's buffer alive."""
    tensor = torch.from_numpy(view.numpy())
    if view.dtype == "BF16":
        tensor = tensor.view(torch.bfloat16)  # numpy has none, and gave its bits
    return tensor.clone() if copy else tensor


@dataclass(frozen=True)
class ReadyLayer:
    """A layer that needs only to be taken: verified, as tensors, on the devices of its modules.

    Each maps to what the layer brings; names that it brings nothing for are missing.

    Attributes:
        planes, gains: by the parameter's name.
        ready: what a weight has made of its planes already, likewise.
        steps, zero_points: by the module's name.
        rows: by the tensor's name.
    """

    planes: Mapping[str, Tensor]
    gains: Mapping[str, Tensor]
    ready: Mapping[str, object]
    steps: Mapping[str, float]
    zero_points: Mapping[str, float]
    rows: Mapping[str, Tensor]


@dataclass(frozen=True)
class _Rows:
    """A tensor that has a row for each bit-width, by its place: moving a model replaces it."""

    module: nn.Module
    leaf: str

    def tensor(self) -> Tensor:
        tensor = (self.module._parameters | self.module._buffers)[self.leaf]
        assert tensor is not None
        return tensor


class HeldLayers:
    """The layers of an artifact in a model.

    Nothing in here waits for those who compute with the model: :func:`plyweight.nn.lease.change`
    is for that, around :meth:`grow` and :meth:`shrink`.

    Attributes:
        header: of the artifact.
        model: whose modules are of the kind that the header says.
    """

    def __init__(self, header: Header, model: nn.Module) -> None:
        self.header, self.model = header, model
        self._packed_weights = self._find_packed_weights()
        self._quantizers = self._find_quantizers()
        self._rows = self._find_rows()

    @classmethod
    def of(cls, model: nn.Module) -> "HeldLayers":
        """Those of a model that :func:`plyweight.load` made, compiled since or not.

        Raises:
            LayeringError: If it did not, or not in packed form.
        """
        model = unwrapped(model)
        header = getattr(model, "_plyweight_artifact", None)
        if not isinstance(header, Header):
            raise LayeringError(
                f"this {type(model).__name__} holds no artifact; upgrade and downgrade take a "
                "model from plyweight.load(file, model) in packed form."
            )
        return cls(header, model)

    def remember(self) -> None:
        """Note on the model itself whose layers it holds."""
        self.model._plyweight_artifact = self.header  # type: ignore[assignment]

    @property
    def num_layers(self) -> int:
        """How many layers every packed weight holds."""
        return min(packed.num_held for packed in self._packed_weights.values())

    def ready(self, index: int, views: Views) -> ReadyLayer:
        """``views`` of layer ``index`` as tensors, on the device of the module that each is for."""
        planes, gains, ready = {}, {}, {}
        for param, packed in self._packed_weights.items():
            # Of a model that is split over devices each part has its own.
            device = packed.scale.device
            if (view := views.get(planes_name(param))) is not None:
                planes[param] = tensor_of(view, copy=False).to(device)
                ready[param] = packed.ready(index, planes[param])
            if (view := views.get(gain_name(param))) is not None:
                gains[param] = tensor_of(view).to(device)
        steps, zero_points = (
            {m: float(tensor_of(views[n])) for m in self._quantizers if (n := name(m)) in views}
            for name in (step_name, zero_point_name)
        )
        rows = {n: tensor_of(views[n]).to(r.tensor()) for n, r in self._rows.items() if n in views}
        return ReadyLayer(planes, gains, ready, steps, zero_points, rows)

    def grow(
        self, layers: Mapping[int, ReadyLayer], bit_width: int, begin: Callable[[], None]
    ) -> bool:
        """Take from ``layers`` what is missing for ``bit_width``, and compute at that.

        Args:
            layers: by number.
            bit_width: of the artifact.
            begin: called when nothing is missing, before the model changes; may raise.

        Returns:
            Whether ``layers`` had all that is missing; if not, the model stays as it was.
        """
        num_before = self.num_layers
        missing = range(num_before, self.header.layer_index(bit_width) + 1)
        if any(index not in layers for index in missing):
            return False
        begin()
        try:
            for index in missing:
                self.take(index, layers[index])
            switch(self.model, bit_width)
        except BaseException:  # no memory, or interrupted
            self._release_to(num_before)
            raise
        return True

    def shrink(self, bit_width: int) -> list[Tensor]:
        """Compute at ``bit_width`` and give back the layers above.

        Returns:
            What the weights held before: their memory is free when the caller lets go of it, for
            to free much takes time, and need not keep requests waiting.

        Raises:
            BitWidthError: If that bit-width is not held.
        """
        held = self.header.bit_widths[: self.num_layers]
        if type(bit_width) is not int or bit_width not in held:
            raise BitWidthError(
                bit_width, stored=held, where="the model", advice="Downgrade to one of those."
            )
        tensors = [t for packed in self._packed_weights.values() for t in packed.buffers()]
        switch(self.model, bit_width)
        self._release_to(held.index(bit_width) + 1)
        return tensors

    def take(self, index: int, layer: ReadyLayer) -> None:
        """Take the next layer, number ``index``: planes and side information."""
        self._release_to(index)  # what an interrupted change left in some of the weights
        for param, packed in self._packed_weights.items():
            packed.hold(
                index, layer.planes.get(param), layer.gains.get(param), layer.ready.get(param)
            )
        self.take_side_information(index, layer)

    def take_side_information(self, index: int, layer: ReadyLayer) -> None:
        """Take from the next layer, number ``index``, what holds from its bit-width on.

        It holds until a later layer replaces it, so all the rows above take it too.
        """
        for module, quantizer in self._quantizers.items():
            step, zero_point = layer.steps.get(module), layer.zero_points.get(module)
            if step is None and zero_point is None:
                continue
            own = quantizer.own_bit_width(self.header.bit_widths[index])
            row = quantizer.own_bit_widths.index(own)
            if step is None:
                step = float(quantizer.steps[row].detach())
            if zero_point is None:
                zero_point = float(quantizer.zero_points[row].detach())
            for bit_width in quantizer.available_bit_widths[index:]:
                quantizer.set_step(bit_width, step, zero_point)
        with torch.no_grad():
            for name, rows in layer.rows.items():
                self._rows[name].tensor()[index:] = rows

    def _release_to(self, num_layers: int) -> None:
        """Give back all but ``num_layers``. Steps and statistics are of no size, and stay."""
        for packed in self._packed_weights.values():
            while packed.num_held > num_layers:
                packed.release(packed.num_held - 1)

    def _find_packed_weights(self) -> dict[str, PackedWeight]:
        """By parameter; none in fake-quantized form."""
        found = {}
        for param in self.header.weights:
            module = self.model.get_submodule(param.rpartition(".")[0])
            if isinstance(module, PackedModule):
                found[param] = module.packed_weight
        return found

    def _find_quantizers(self) -> dict[str, ActivationQuantizer]:
        found = {}
        for name in self.header.activations:
            module = self.model.get_submodule(name)
            quantizer = module if is_output(name) else module.input_quantizer
            assert isinstance(quantizer, ActivationQuantizer)
            found[name] = quantizer
        return found

    def _find_rows(self) -> dict[str, _Rows]:
        """By the tensor's name inside a layer."""
        switchable = tuple(BATCH_NORMS.values())
        found: dict[str, _Rows] = {}
        for name, module in self.model.named_modules():
            prefix = f"{name}." if name else ""
            if isinstance(module, switchable):
                leaves: tuple[str, ...] = BATCH_NORM_TENSORS
            elif isinstance(module, BiasByBitWidth) and module.has_bias_rows:
                leaves = ("bias",)
            else:
                continue
            tensors = module._parameters | module._buffers
            found |= {
                prefix + leaf: _Rows(module, leaf) for leaf in leaves if tensors[leaf] is not None
            }
        return found
