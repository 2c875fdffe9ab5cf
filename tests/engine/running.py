"""Running an ONNX model whose values are beside it, as the engine does."""

import numpy as np
import onnxruntime

from plyweight.engine.exactness import does_saturate
from plyweight.engine.onnx_filled import filled


def run(data, values, feeds):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if does_saturate(onnxruntime):
        options.add_session_config_entry("session.x64quantprecision", "1")
    data = filled(data, {name: np.asarray(value) for name, value in values.items()})
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)
