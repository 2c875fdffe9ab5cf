"""plyweight: one layered file that holds a network at every bit-width.

    model = plyweight.prepare(network, bit_widths=(2, 3, 4, 8))    quantized at every width
    objective = plyweight.JointObjective(model, criterion)         one run trains them all
    plyweight.pack(model, "network.layered.safetensors")           every width is a prefix
    network = plyweight.load(url, network, bit_width=4)            as much as a device needs
    plyweight.upgrade(network, url, bit_width=8)                   only what is missing
    engine = plyweight.open(url, bit_width=4)                      the same without torch

Public names are looked up on first use (PEP 562), so that handling bytes never imports torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__all__ = [
    "ArtifactError",
    "BitWidthError",
    "BudgetError",
    "DeliveryError",
    "DigestError",
    "EngineError",
    "GraphError",
    "HeaderError",
    "InputError",
    "JointObjective",
    "KernelError",
    "LayeringError",
    "LossError",
    "ModelMismatchError",
    "OutputError",
    "PlyweightError",
    "RangeError",
    "Report",
    "SourceError",
    "StaleError",
    "TransferError",
    "TruncatedError",
    "TrustError",
    "TrustWarning",
    "VersionError",
    "at_bit_width",
    "bit_widths_of",
    "calibrate",
    "downgrade",
    "evict",
    "export",
    "fetch",
    "fit_edges",
    "inspect",
    "lease",
    "load",
    "open",
    "pack",
    "prepare",
    "recalibrate",
    "report",
    "set_bit_width",
    "set_kernel",
    "start_upgrade",
    "upgrade",
    "verify",
]

_HOMES = {
    "ArtifactError": "plyweight.errors",
    "BitWidthError": "plyweight.errors",
    "BudgetError": "plyweight.errors",
    "DeliveryError": "plyweight.errors",
    "DigestError": "plyweight.errors",
    "EngineError": "plyweight.errors",
    "GraphError": "plyweight.errors",
    "HeaderError": "plyweight.errors",
    "InputError": "plyweight.errors",
    "JointObjective": "plyweight.train.objective",
    "KernelError": "plyweight.errors",
    "LayeringError": "plyweight.errors",
    "LossError": "plyweight.errors",
    "ModelMismatchError": "plyweight.errors",
    "OutputError": "plyweight.errors",
    "PlyweightError": "plyweight.errors",
    "RangeError": "plyweight.errors",
    "Report": "plyweight.nn.report",
    "SourceError": "plyweight.errors",
    "StaleError": "plyweight.errors",
    "TransferError": "plyweight.errors",
    "TruncatedError": "plyweight.errors",
    "TrustError": "plyweight.errors",
    "TrustWarning": "plyweight.errors",
    "VersionError": "plyweight.errors",
    "at_bit_width": "plyweight.nn.bit_width",
    "bit_widths_of": "plyweight.nn.bit_width",
    "calibrate": "plyweight.train.calibrate",
    "downgrade": "plyweight.loading.verbs",
    "evict": "plyweight.delivery.fetch",
    "export": "plyweight.exporting.verbs",
    "fetch": "plyweight.delivery.fetch",
    "fit_edges": "plyweight.packing.fitting",
    "inspect": "plyweight.inspecting",
    "lease": "plyweight.nn.bit_width",
    "load": "plyweight.loading.verbs",
    "open": "plyweight.engine.opening",
    "pack": "plyweight.packing.verbs",
    "prepare": "plyweight.nn.swap",
    "recalibrate": "plyweight.train.batch_norm",
    "report": "plyweight.nn.report",
    "set_bit_width": "plyweight.nn.bit_width",
    "set_kernel": "plyweight.nn.choosing",
    "start_upgrade": "plyweight.loading.verbs",
    "upgrade": "plyweight.loading.verbs",
    "verify": "plyweight.artifact.reader",
}

if TYPE_CHECKING:
    from plyweight.artifact.reader import verify
    from plyweight.delivery.fetch import evict, fetch
    from plyweight.engine.opening import open
    from plyweight.errors import (
        ArtifactError,
        BitWidthError,
        BudgetError,
        DeliveryError,
        DigestError,
        EngineError,
        GraphError,
        HeaderError,
        InputError,
        KernelError,
        LayeringError,
        LossError,
        ModelMismatchError,
        OutputError,
        PlyweightError,
        RangeError,
        SourceError,
        StaleError,
        TransferError,
        TruncatedError,
        TrustError,
        TrustWarning,
        VersionError,
    )
    from plyweight.exporting.verbs import export
    from plyweight.inspecting import inspect
    from plyweight.loading.verbs import downgrade, load, start_upgrade, upgrade
    from plyweight.nn.bit_width import at_bit_width, bit_widths_of, lease, set_bit_width
    from plyweight.nn.choosing import set_kernel
    from plyweight.nn.report import Report, report
    from plyweight.nn.swap import prepare
    from plyweight.packing.fitting import fit_edges
    from plyweight.packing.verbs import pack
    from plyweight.train.batch_norm import recalibrate
    from plyweight.train.calibrate import calibrate
    from plyweight.train.objective import JointObjective

    __version__: str


def __getattr__(name: str) -> object:
    if name == "__version__":
        value: object = import_module("importlib.metadata").version("plyweight")
    elif name in _HOMES:
        value = getattr(_home_of(name), name)
    else:
        raise AttributeError(f"module 'plyweight' has no attribute {name!r}")
    globals()[name] = value  # the next use finds it without asking here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


def _home_of(name: str) -> object:
    try:
        return import_module(_HOMES[name])
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ImportError(
            f"plyweight.{name} needs PyTorch, which is not installed; "
            'install it with: pip install "plyweight[train]"'
        ) from error
