"""export: one bit-width of an artifact, written whole or not at all."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from plyweight.artifact import ArtifactReader, Source, publish_atomically
from plyweight.errors import LayeringError, OutputError
from plyweight.exporting.state_dict import state_dict_bytes

if TYPE_CHECKING:
    from torch import nn

__all__ = ["DTYPES", "FORMATS", "ExportReport", "Format", "export"]

Format = Literal["safetensors", "onnx", "onnx-int4", "openvino", "torch"]
FORMATS = ("safetensors", "onnx", "onnx-int4", "openvino", "torch")
DTYPES = ("float32", "float16")  # of weights; numpy has no bfloat16 to round to


@dataclass(frozen=True)
class ExportReport:
    """What :func:`plyweight.export` wrote.

    Attributes:
        path: the file; of two the one that is opened.
        format: as asked for.
        bit_width: that it computes at.
        num_bytes: of all that was written.
        difference: the mean difference between its outputs and the engine's (for "torch" the loaded
            model's), read back and run, in parts of the outputs' standard deviation; None for a
            state dict, which is not run.
        evaluation: what the artifact says was measured at this bit-width, decimal texts by metric.
    """

    path: Path
    format: str
    bit_width: int
    num_bytes: int
    difference: float | None
    evaluation: Mapping[str, str]


def export(
    source: str | os.PathLike[str] | Source,
    path: str | os.PathLike[str],
    *,
    bit_width: int | None = None,
    to: Format = "safetensors",
    dtype: Literal["float32", "float16"] = "float32",
    model: "nn.Module | None" = None,
    example_inputs: Any = None,
) -> ExportReport:
    """Write one bit-width as a file that other tools read.

    "safetensors" is a plain state dict: layered weights become ``level * scale * gain``, exactly
    the values that :func:`plyweight.load` computes with; biases, norms and buffers are those of
    that bit-width. Names are those of the artifact, so of the prepared network (whose attention is
    taken apart into projections), and a tensor that several modules share is there once. Quantized
    activations are no weights: their steps are left out, and whoever runs the file runs it with
    float activations. Same artifact, same bytes.

    "onnx" and "openvino" are the artifact's graph with the values of that bit-width, int8 weights
    and quantized activations included; "onnx-int4" is the same with half a byte for each weight of
    4 bits and fewer, which a runtime turns into int8 when it loads the file, or multiplies floats
    with (ONNX Runtime's ``MatMulNBits``). They are read back by their own runtime and compared with
    the engine before anything stands at ``path``: ONNX Runtime gives the same numbers, but for the
    rounding of sums where activations are floats; OpenVINO's integer kernels nearly the same.

    "torch" is a ``torch.export`` program of what :func:`plyweight.load` gives, for who has torch
    and not the network's code; it is compared with the loaded model and equals it.

    Args:
        source: an artifact, whole or a prefix of one.
        path: the file to write. For "openvino" it ends in ``.xml``, and the weights go into a
            ``.bin`` of the same name beside it.
        bit_width: None for the widest that the source holds.
        to: the format, one of those.
        dtype: of the layered weights of a state dict; all else keeps its own.
        model: for "torch", the float network, as :func:`plyweight.load` takes it.
        example_inputs: for "torch", a batch, as :func:`plyweight.pack` takes it; the first
            dimension may have any length afterwards.

    Raises:
        BitWidthError: If that bit-width is not held.
        ArtifactError: If the artifact is damaged.
        GraphError: If there is no graph to export, or what was written computes something else.
        LayeringError: If an argument is wrong.
        OutputError: If the file cannot be written, or is the artifact itself.
        ImportError: If what writes or reads the format is not installed.
    """
    if to not in FORMATS:
        raise LayeringError(f"to is {to!r}; give one of {', '.join(map(repr, FORMATS))}.")
    if dtype not in DTYPES:
        raise LayeringError(f"dtype is {dtype!r}; give one of {', '.join(map(repr, DTYPES))}.")
    if to != "safetensors" and dtype != "float32":
        raise LayeringError(f"dtype is {dtype!r}, but {to!r} has weights of its own; leave it out.")
    if to != "torch" and (model is not None or example_inputs is not None):
        raise LayeringError(
            f"model and example_inputs are for 'torch', not {to!r}; leave out both."
        )
    _refuse_source(source, Path(path), to)
    reader = ArtifactReader(source)
    target = reader.held_bit_widths[-1] if bit_width is None else bit_width
    num_layers = reader.header.layer_index(target) + 1
    layers = [reader.read_layer(index) for index in range(num_layers)]
    difference = None
    if to == "safetensors":
        head, data = state_dict_bytes(reader.header, layers, dtype)
        with publish_atomically(path) as file:
            file.write(head)
            file.write(data)
        written = [Path(path)]
    elif to == "torch":
        from plyweight.exporting.torch_program import write_program

        difference, written = write_program(source, target, Path(path), model, example_inputs)
    elif to.startswith("onnx"):
        from plyweight.exporting.onnx import write_onnx

        difference, written = write_onnx(
            reader.header, layers, target, Path(path), is_int4=to == "onnx-int4"
        )
    else:
        from plyweight.exporting.openvino import write_openvino

        difference, written = write_openvino(reader.header, layers, target, Path(path))
    return ExportReport(
        path=Path(path),
        format=to,
        bit_width=target,
        num_bytes=sum(each.stat().st_size for each in written),
        difference=difference,
        evaluation=(reader.header.evaluation or {}).get(target, {}),
    )


def _refuse_source(source: object, path: Path, to: str) -> None:
    """An artifact must not be what is written over."""
    if isinstance(source, (str, os.PathLike)) and Path(source).is_file():
        for target in (path, path.with_suffix(".bin")) if to == "openvino" else (path,):
            if target.exists() and target.samefile(source):
                raise OutputError(
                    f"{target} is the artifact itself, which would be lost; give another name."
                )
