"""The engine: an artifact's graph at any width, on a runtime for devices that have no torch.

    artifact ── graph ──► slots ── values at b bits ──► session ──► outputs
                         (names)   (levels, scales, biases, steps)

Needs numpy, and ONNX Runtime (the extra ``[engine]``) or OpenVINO (``[openvino]``), which are
imported when an engine is opened.
"""

from plyweight.engine.engine import Engine
from plyweight.engine.forms import Form
from plyweight.engine.opening import open
from plyweight.engine.report import EngineReport, WarmReport

__all__ = ["Engine", "EngineReport", "Form", "WarmReport", "open"]
