"""torch_program: a loaded model at one bit-width as a torch.export program, a ``.pt2``."""

import io
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from plyweight.artifact import Source, publish_atomically
from plyweight.engine.session import first_line
from plyweight.errors import LayeringError
from plyweight.graph.examples import Batch, batches_of, dynamic_shapes, two_or_more
from plyweight.loading.verbs import load

__all__ = ["write_program"]


def write_program(
    source: str | os.PathLike[str] | Source,
    bit_width: int,
    path: Path,
    model: nn.Module | None,
    example_inputs: Any,
) -> tuple[float, list[Path]]:
    """Write ``path``: what :func:`plyweight.load` makes of ``source``, traced.

    Returns:
        The difference to the loaded model, which is 0, and the files.
    """
    if not isinstance(model, nn.Module) or example_inputs is None:
        raise LayeringError(
            "a torch program needs the float network and inputs to trace it with, which no "
            "artifact has; give model= and example_inputs=."
        )
    loaded = load(source, model, bit_width=bit_width)
    batch = batches_of(loaded, example_inputs)[0]
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    batch = tuple(two_or_more(item).to(device) for item in batch)
    try:
        program = torch.export.export(
            loaded, batch, dynamic_shapes=tuple(dynamic_shapes([batch])), strict=False
        )
    except Exception as error:  # whatever the model's own code raises under a trace
        raise LayeringError(
            f"this {type(model).__name__} cannot be traced by torch.export "
            f"({first_line(error)}); export safetensors instead."
        ) from error
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    restored = torch.export.load(buffer).module()
    for inputs in (batch, tuple(item[:1] for item in batch)):
        if not _is_same(restored, loaded, inputs):
            raise LayeringError(
                "the exported program computes something else than the loaded model; nothing was "
                "written. Please report this."
            )
    with publish_atomically(path) as file:
        file.write(buffer.getvalue())
    return 0.0, [path]


def _is_same(one: nn.Module, other: nn.Module, inputs: Batch) -> bool:
    with torch.no_grad():
        outputs, expected = one(*inputs), other(*inputs)
    flat, wanted = (torch.utils._pytree.tree_leaves(value) for value in (outputs, expected))
    return len(flat) == len(wanted) and all(map(torch.equal, flat, wanted))
