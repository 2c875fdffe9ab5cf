"""openvino: a graph with the values of one bit-width as OpenVINO IR, an .xml and a .bin."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from plyweight.artifact import Header, publish_atomically
from plyweight.engine.backends import OPENVINO
from plyweight.engine.openvino_model import fused
from plyweight.engine.openvino_session import SETTINGS, openvino
from plyweight.engine.session import first_line
from plyweight.engine.values import Views
from plyweight.errors import GraphError, LayeringError
from plyweight.exporting.onnx import Filled, mean_difference

__all__ = ["write_openvino"]

ENDING = ".xml"
# OpenVINO multiplies by the reciprocal of a step where ONNX Runtime divides, so that a value beside
# a threshold may fall to its other side, which a deep net makes more of. Measured on random inputs
# at 2 to 8 bits: 1e-7 for the tests' nets and a ResNet-8, 0.01 for a ResNet-20, and 0.2 for a
# MobileNetV2 of random weights, where 2 values of one sum become 3 % of a later one's. Twice that
# is allowed; the outputs of another network are off by a half and more.
MOST_DIFFERENCE = 0.4


def write_openvino(
    header: Header, layers: Sequence[Views], bit_width: int, path: Path
) -> tuple[float, list[Path]]:
    """Write ``path``, which ends in .xml, and its .bin, if they compute what the engine does.

    Returns:
        The mean difference in parts of the outputs' standard deviation, and the files.
    """
    if path.suffix != ENDING:
        raise LayeringError(
            f"the path is {str(path)!r}; OpenVINO reads two files, so give one that ends in "
            f"{ENDING}, and the weights go beside it into {path.stem}.bin."
        )
    runtime = openvino()
    filled = Filled(header, layers, bit_width, str(path), runtime=OPENVINO)
    core = runtime.Core()
    weights = path.with_suffix(".bin")
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder, path.name)
        try:
            model = core.read_model(filled.data)
            fused(model)
            runtime.save_model(model, draft, compress_to_fp16=False)
            compiled = core.compile_model(draft, "CPU", dict(SETTINGS))
        except Exception as error:  # those of the runtime have no class in common
            raise GraphError(
                f"OpenVINO {runtime.__version__} refuses the graph ({first_line(error)}); export "
                "onnx instead."
            ) from error
        differences = [
            mean_difference([compiled(dict(feeds))[p.name] for p in filled.graph.outputs], expected)
            for feeds, expected in filled.answers()
        ]
        difference = float(np.max(differences))  # a NaN stays one
        if not difference <= MOST_DIFFERENCE:
            raise GraphError(
                f"OpenVINO {runtime.__version__} computes something else from the exported files "
                f"than the engine (off by {difference:.2g} of the outputs' spread); nothing was "
                "written. Export onnx instead."
            )
        with publish_atomically(weights) as file:
            file.write(draft.with_suffix(".bin").read_bytes())
            with publish_atomically(path) as other:  # so neither is there before both are written
                other.write(draft.read_bytes())
    return difference, [path, weights]
