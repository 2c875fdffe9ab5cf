"""pack: a trained model becomes one artifact, written whole or not at all."""

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from plyweight.artifact import (
    GRAPH_NAME,
    ArtifactReader,
    Graph,
    LayerContent,
    ModelInfo,
    Receipt,
    TensorData,
    inspect,
    write_artifact,
)
from plyweight.errors import BitWidthError, LayeringError
from plyweight.graph.description import described
from plyweight.nn.swap import unwrapped
from plyweight.packing.contents import Contents, checked_state

__all__ = ["draft", "graph_extra", "pack"]


def pack(
    model: nn.Module | Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    revision: int = 0,
    license: str | None = None,
    evaluation: Mapping[int, Mapping[str, str]] | None = None,
    example_inputs: Any = None,
    preprocessing: Mapping[str, Any] | None = None,
    labels: Sequence[str] | None = None,
) -> Receipt:
    """Write ``model`` as one artifact; every stored bit-width is a prefix of the file.

    The same weights (and example inputs) make the same bytes. The file appears whole or not at
    all. With example inputs the artifact carries its graph, and runs where there is no torch: see
    :func:`plyweight.open`.

    Args:
        model: what :func:`plyweight.prepare` returned, trained; or its ``state_dict()``.
        path: of the file to write.
        name: of the model, for people; its class name by default.
        revision: counts up with every publication under that name.
        license: an identifier such as "Apache-2.0".
        evaluation: metrics by bit-width, decimal strings: ``{4: {"accuracy": "0.981"}}``.
        example_inputs: what the model takes: a tensor; a tuple, the arguments of its forward; or
            batches (a data loader), of which the model takes as many items as it has to have.
            Needs the extra ``[onnx]``. The model is exported with the first batch; ranges of
            activations that no training has learned are calibrated on all of them, so give a
            few hundred real samples. The first dimension may have any length afterwards, and so
            may those that differ from batch to batch.
        preprocessing: how data become inputs, for those who feed the graph; texts, integers,
            lists and mappings, with fractions as decimal texts.
        labels: the names of the classes.

    Returns:
        What is in the file and what it costs, read back from it.

    Raises:
        LayeringError: If the model is not layered, a weight is not finite, an activation
            quantizer has not seen a batch, a tensor cannot be stored, or an argument is wrong;
            and if there are example inputs and the model cannot be exported.
        BitWidthError: If ``evaluation`` names a bit-width that the model does not have.
        OutputError: If the file cannot be written.
        ImportError: If there are example inputs and the extra ``[onnx]`` is not installed.
    """
    default_name = "model"
    if isinstance(model, nn.Module):
        model = unwrapped(model)
        default_name = type(model).__name__
    contents = Contents.of(checked_state(model), by_object=isinstance(model, nn.Module))
    _check_arguments(path, name, revision, license, evaluation, contents.bit_widths)
    info = _info(default_name if name is None else name, revision, license)
    graph = None if example_inputs is None else _graph(model, example_inputs, contents)
    io = described(graph, preprocessing, labels)
    _write(path, contents, info, graph=graph, evaluation=evaluation, io=io)
    return inspect(path)


def _graph(model: object, example_inputs: Any, contents: Contents) -> Graph:
    """The graph of ``model``, whose artifact is written without it first, to calibrate on it."""
    if not isinstance(model, nn.Module):
        raise LayeringError(
            "example_inputs were given with a state dict, which does not say what is computed; "
            "pack the model itself."
        )
    with graph_extra():
        from plyweight.graph.build import build_graph
    with draft(contents) as artifact:
        return build_graph(model, example_inputs, artifact)


@contextlib.contextmanager
def graph_extra() -> Iterator[None]:
    """Say what to install where an import within this block fails.

    Raises:
        ImportError: If the extra ``[onnx]`` is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ImportError(
            f"a graph needs onnx, onnxscript and onnxruntime ({error}); run: pip install "
            '"plyweight[onnx]", or pack without example_inputs.'
        ) from error


@contextlib.contextmanager
def draft(contents: Contents) -> Iterator[ArtifactReader]:
    """An artifact of ``contents``, without a graph, as long as the block lasts."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "without-graph")
        _write(path, contents, _info("draft"))
        yield ArtifactReader(path)


def _info(name: str, revision: int = 0, license: str | None = None) -> ModelInfo:
    return ModelInfo(
        name=name,
        revision=revision,
        created_by=f"plyweight {version('plyweight')}",
        license=license,
        config_sha256=None,
    )


def _write(
    path: str | os.PathLike[str],
    contents: Contents,
    info: ModelInfo,
    *,
    graph: Graph | None = None,
    evaluation: Mapping[int, Mapping[str, str]] | None = None,
    io: Mapping[str, Any] | None = None,
) -> None:
    layers = [contents.layer(i) for i in range(len(contents.bit_widths))]
    weights, activations = contents.records()
    if graph is not None:
        data = graph.to_bytes()
        tensor = TensorData(GRAPH_NAME, "U8", (len(data),), data)
        layers[0] = LayerContent(layers[0].bit_width, (*layers[0].tensors, tensor))
    write_artifact(
        path,
        layers=layers,
        weights=weights,
        activations=activations,
        model=info,
        evaluation=evaluation,
        io=io,
    )


def _check_arguments(
    path: object,
    name: object,
    revision: object,
    license: object,
    evaluation: object,
    bit_widths: tuple[int, ...],
) -> None:
    if not isinstance(path, (str, os.PathLike)):
        raise LayeringError(f"path is a {type(path).__name__}; give the file to write.")
    for what, text in (("name", name), ("license", license)):
        if text is not None and not isinstance(text, str):
            raise LayeringError(f"{what} is {text!r}; give a text or None.")
    if type(revision) is not int or revision < 0:
        raise LayeringError(f"revision is {revision!r}; give an integer of 0 or more.")
    if evaluation is None:
        return
    if not isinstance(evaluation, Mapping):
        raise LayeringError(f"evaluation is {evaluation!r}; give metrics by bit-width.")
    for bit_width, metrics in evaluation.items():
        if bit_width not in bit_widths:
            raise BitWidthError(bit_width, stored=bit_widths, where="the model")
        if not isinstance(metrics, Mapping) or not all(
            isinstance(text, str) for item in metrics.items() for text in item
        ):
            raise LayeringError(
                f"evaluation[{bit_width}] is {metrics!r}; give decimal strings by metric, such as "
                "{'accuracy': '0.981'}."
            )
