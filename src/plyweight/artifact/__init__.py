"""The file: planes of all weights by significance, so that every bit-width is a prefix of it.

    write_artifact(path, layers=..., weights=..., ...)      numbers to bytes
    ArtifactReader(path).read_layer(0)                      bytes to numbers, verified
    inspect(path)                                           what every bit-width costs
    split(path, folder), join(folder, path)                 one file for each layer, and back

Needs numpy only; ``docs/format.md`` is the format in words.
"""

from plyweight.artifact.files import publish_atomically
from plyweight.artifact.graph import Graph, Slot
from plyweight.artifact.graph_fields import Model, Module, Norm, Port, Quantizer
from plyweight.artifact.header import MAX_HEADER_BYTES, VERSION, Header, header_bytes
from plyweight.artifact.layout import Alignment, ByteRange, align_up, choose_alignment
from plyweight.artifact.names import (
    GRAPH_NAME,
    gain_name,
    is_output,
    planes_name,
    scale_name,
    step_name,
    zero_point_name,
)
from plyweight.artifact.opening import open_source, split_folder
from plyweight.artifact.parts import SplitSource
from plyweight.artifact.reader import ArtifactReader, verify
from plyweight.artifact.receipt import LayerReceipt, Receipt, inspect
from plyweight.artifact.records import (
    ITEM_BYTES,
    Activation,
    Layer,
    LayeredWeight,
    ModelInfo,
    TensorEntry,
)
from plyweight.artifact.sidecar import Part, Sidecar
from plyweight.artifact.source import FileSource, MemorySource, Source
from plyweight.artifact.split import join, split
from plyweight.artifact.values import TensorView
from plyweight.artifact.writer import LayerContent, TensorData, write_artifact

__all__ = [
    "Activation",
    "Alignment",
    "ArtifactReader",
    "ByteRange",
    "FileSource",
    "GRAPH_NAME",
    "Graph",
    "Header",
    "ITEM_BYTES",
    "Layer",
    "LayerContent",
    "LayerReceipt",
    "LayeredWeight",
    "MAX_HEADER_BYTES",
    "MemorySource",
    "Model",
    "ModelInfo",
    "Module",
    "Norm",
    "Part",
    "Port",
    "Quantizer",
    "Receipt",
    "Sidecar",
    "Slot",
    "Source",
    "SplitSource",
    "TensorData",
    "TensorEntry",
    "TensorView",
    "VERSION",
    "align_up",
    "choose_alignment",
    "gain_name",
    "is_output",
    "header_bytes",
    "inspect",
    "join",
    "open_source",
    "planes_name",
    "publish_atomically",
    "scale_name",
    "split",
    "split_folder",
    "step_name",
    "verify",
    "write_artifact",
    "zero_point_name",
]
