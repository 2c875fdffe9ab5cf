"""pack: a trained model, or its state dict, becomes one artifact.

contents    a state dict, sorted into layers
verbs       pack: checks what it is given, and writes layers and graph
"""

from plyweight.packing.verbs import pack

__all__ = ["pack"]
