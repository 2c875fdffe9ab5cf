"""Once-QAT: one training run that serves every bit-width (torch)."""

from plyweight.train.balance import Balance, NormalizedMGDA
from plyweight.train.batch_norm import recalibrate
from plyweight.train.calibrate import calibrate
from plyweight.train.groups import RateByBitWidth, parameter_groups
from plyweight.train.objective import JointObjective, soft_cross_entropy
from plyweight.train.penalties import damping_penalty, moment_penalty
from plyweight.train.sampling import AllBitWidths, Sampler, Sandwich

__all__ = [
    "AllBitWidths",
    "Balance",
    "JointObjective",
    "NormalizedMGDA",
    "RateByBitWidth",
    "Sampler",
    "Sandwich",
    "calibrate",
    "damping_penalty",
    "moment_penalty",
    "parameter_groups",
    "recalibrate",
    "soft_cross_entropy",
]
