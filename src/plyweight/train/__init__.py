"""Once-QAT: one training run that serves every bit-width (torch)."""

from plyweight.train.batch_norm import recalibrate
from plyweight.train.objective import JointObjective, soft_cross_entropy
from plyweight.train.sampling import AllBitWidths, Sampler, Sandwich

__all__ = [
    "AllBitWidths",
    "JointObjective",
    "Sampler",
    "Sandwich",
    "recalibrate",
    "soft_cross_entropy",
]
