"""pack: a trained model, or its state dict, becomes one artifact.

contents    a state dict, sorted into layers
verbs       pack: checks what it is given, and writes layers and graph
fitting     fit_edges: torch rounds what the graph will round
"""

from plyweight.packing.fitting import EdgeReport, fit_edges
from plyweight.packing.verbs import pack

__all__ = ["EdgeReport", "fit_edges", "pack"]
