"""Checkpoints of the CIFAR-10 example: what resumes a run, and what refuses to.

A checkpoint is published whole or not at all, so a kill at any moment leaves the last one. Beside
the state of the run it holds its configuration, everything that decides what is computed; a run
goes on only from a checkpoint of exactly its own. Files are read by ``weights_only=True``, or are
safetensors: nothing in them can run.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from plyweight.artifact import publish_atomically
from plyweight.errors import listed

__all__ = [
    "CheckpointError",
    "Configuration",
    "digest_of",
    "load_weights",
    "read_checkpoint",
    "read_finished_weights",
    "refuse_another",
    "write_checkpoint",
    "write_finished_weights",
]

# Plain values by name, nested; JSON and ``weights_only`` keep them as they are.
Configuration = dict[str, Any]


class CheckpointError(Exception):
    """A file of weights or of a run cannot be used for what was asked."""


def write_checkpoint(path: Path, configuration: Configuration, state: dict[str, Any]) -> None:
    """Publish the state of a run; the one before stays until this one is complete."""
    with publish_atomically(path) as file:
        torch.save({"configuration": configuration, "state": state}, file)


def read_checkpoint(path: Path, configuration: Configuration) -> dict[str, Any] | None:
    """The state at ``path``, or None where there is none.

    Raises:
        CheckpointError: If it is damaged, or of a run of another configuration.
    """
    if not path.exists():
        return None
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        theirs, state = found["configuration"], found["state"]
    except Exception as error:  # bytes that are no checkpoint make the unpickler raise anything
        raise CheckpointError(
            f"{path} is not a checkpoint of this example; move it away to start again, or give "
            "another --out."
        ) from error
    refuse_another(path, theirs, configuration)
    return state


def write_finished_weights(path: Path, configuration: Configuration, net: nn.Module) -> None:
    """Publish the weights of a float network that is trained, for this run and others."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in net.state_dict().items()}
    metadata = {"configuration": json.dumps(configuration)}
    with publish_atomically(path) as file:
        file.write(safetensors.torch.save(tensors, metadata))


def read_finished_weights(path: Path, configuration: Configuration) -> dict[str, Tensor] | None:
    """The weights at ``path``, or None where there are none yet.

    Raises:
        CheckpointError: If they are damaged, or of a run of another configuration.
    """
    if not path.exists():
        return None
    try:
        with safetensors.safe_open(path, "pt") as file:
            theirs = json.loads(file.metadata()["configuration"])
            tensors = {name: file.get_tensor(name) for name in file.offset_keys()}
    except Exception as error:  # not a safetensors file, or not one of ours
        raise CheckpointError(
            f"{path} holds no weights of this example; move it away to start again, or give "
            "another --out."
        ) from error
    refuse_another(path, theirs, configuration)
    return tensors


def refuse_another(path: Path, theirs: Configuration, ours: Configuration) -> None:
    """Nothing, if both configurations are the same.

    Raises:
        CheckpointError: If not; it says what differs.
    """
    there, here = _flat(theirs), _flat(ours)
    missing = "nothing"
    differences = [
        f"{name} is {there.get(name, missing)} there and {here.get(name, missing)} here"
        for name in sorted({*there, *here})
        if there.get(name, missing) != here.get(name, missing)
    ]
    if differences:
        raise CheckpointError(
            f"{path} is of another run: {', '.join(differences)}. Give the same options to go on "
            "with it, or another --out to start a new one."
        )


def load_weights(net: nn.Module, path: Path) -> None:
    """Give ``net`` the float weights of a ``.safetensors`` or ``.pt`` file.

    Raises:
        CheckpointError: If the file is missing or damaged, or its weights are not those of ``net``.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; give a .safetensors or .pt file.")
    try:
        if path.suffix == ".safetensors":
            weights = safetensors.torch.load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no weights make the readers raise anything
        raise CheckpointError(
            f"{path} cannot be read as weights; write them with safetensors.torch.save_file or "
            "torch.save(net.state_dict(), path)."
        ) from error
    give_weights(net, weights, where=path)


def give_weights(net: nn.Module, weights: Mapping[str, Tensor], *, where: Path) -> None:
    """Give ``net`` all of ``weights``; counts of batches may be missing.

    Raises:
        CheckpointError: If names or shapes are not those of ``net``.
    """
    expected = net.state_dict()
    counts = {name for name in expected if name.endswith(".num_batches_tracked")}
    if not isinstance(weights, Mapping):
        weights = {}
    differences = [f"{name} is missing" for name in expected.keys() - counts - weights.keys()]
    differences += [f"{name} is unknown" for name in weights.keys() - expected.keys()]
    differences += [
        f"{name} is {_shape(weights[name])} there and {_shape(expected[name])} here"
        for name in expected.keys() & weights.keys()
        if _shape(weights[name]) != _shape(expected[name])
    ]
    if differences:
        raise CheckpointError(
            f"{where} is not of this {type(net).__name__}: {listed(sorted(differences), most=4)}. "
            "Give the --net that it was trained as, with the same number of classes."
        )
    net.load_state_dict(dict(weights), strict=False)


def digest_of(net: nn.Module) -> str:
    """Sixteen hex digits that tell these weights from others."""
    digest = hashlib.sha256()
    for name, tensor in net.state_dict().items():
        if not name.endswith(".num_batches_tracked"):
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _shape(tensor: object) -> tuple[int, ...] | str:
    return tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__


def _flat(configuration: Configuration, prefix: str = "") -> dict[str, object]:
    """The values by their path, so that two configurations are compared one by one."""
    flat: dict[str, object] = {}
    for name, value in configuration.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
