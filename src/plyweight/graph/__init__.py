"""From a torch module to an ONNX graph without weights, one for all bit-widths (torch)."""

from plyweight.graph.build import build_graph

__all__ = ["build_graph"]
