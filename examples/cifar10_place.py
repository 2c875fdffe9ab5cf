"""Where the CIFAR-10 example computes: on which device, compiled or not, and beside whom.

Started by ``torchrun``, several processes share every batch; started by ``python``, there is one.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["COMPILE_MODES", "Place", "PlaceError", "place_of_this_process"]

# What --compile offers, and the mode of torch.compile it stands for.
COMPILE_MODES = {"none": None, "default": "default", "cuda-graphs": "reduce-overhead"}


class PlaceError(Exception):
    """There is no such device here."""


@dataclass(frozen=True)
class Place:
    """Where one process computes.

    Attributes:
        device: of this process.
        rank: of this process, 0 for the one that logs and writes files.
        num_processes: that share every batch.
        compile: a key of ``COMPILE_MODES``.
        is_mixed: whether convolutions and matrix products are computed in bfloat16.
    """

    device: torch.device
    rank: int = 0
    num_processes: int = 1
    compile: str = "none"
    is_mixed: bool = False

    @property
    def is_first(self) -> bool:
        """Whether this is the process that logs and writes files."""
        return self.rank == 0

    def compiled(self, net: nn.Module) -> nn.Module:
        """``net`` as it is called; it shares its parameters."""
        if self.compile == "none":
            return net
        # A graph for each shape: one for any shape is slower, and there are only three or four.
        return torch.compile(net, mode=COMPILE_MODES[self.compile], dynamic=False)

    def shared(self, net: nn.Module) -> nn.Module:
        """``net`` whose gradients are the mean over all processes."""
        if self.num_processes == 1:
            return net
        # A batch norm goes by its own part of the batch, and keeps the first process's statistics.
        return DistributedDataParallel(net)

    def autocast(self) -> torch.autocast:
        """The context in which losses are computed."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.is_mixed)

    def any_process(self, flag: bool) -> bool:
        """Whether ``flag`` is set in any process; all of them must ask."""
        return bool(self.largest(int(flag)))

    def largest(self, number: int) -> int:
        """The largest ``number`` of all processes; all of them must ask."""
        if self.num_processes == 1:
            return number
        numbers = torch.tensor(number, device=self.device)
        torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MAX)
        return int(numbers)

    def wait(self) -> None:
        """Go on when all processes have come here."""
        if self.num_processes > 1:
            torch.distributed.barrier()


@contextlib.contextmanager
def place_of_this_process(
    device: str | None, *, compile: str = "none", is_mixed: bool = False
) -> Iterator[Place]:
    """The place that ``device`` and the environment of ``torchrun`` say, while the block runs.

    Args:
        device: "cpu", "cuda" ...; None for a GPU if there is one.
        compile: a key of ``COMPILE_MODES``.
        is_mixed: whether to compute in bfloat16 where that is safe.

    Raises:
        PlaceError: If there is no such device here.
    """
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    kind = _device_named(device or ("cuda" if torch.cuda.is_available() else "cpu"), num_processes)
    if num_processes == 1:
        yield Place(kind, compile=compile, is_mixed=is_mixed)
        return
    if kind.type == "cuda":
        torch.cuda.set_device(kind)
    torch.distributed.init_process_group("nccl" if kind.type == "cuda" else "gloo")
    try:
        rank = torch.distributed.get_rank()
        yield Place(kind, rank, num_processes, compile=compile, is_mixed=is_mixed)
    finally:
        torch.distributed.destroy_process_group()


def _device_named(name: str, num_processes: int) -> torch.device:
    """The device of that name, or of several GPUs the one of this process; it was computed on."""
    try:
        device = torch.device(name)
        if device.type == "cuda" and num_processes > 1:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        float(torch.ones((), device=device))
    except (RuntimeError, AssertionError, ImportError) as error:  # what torch says in its places
        reason = str(error).splitlines()[0].rstrip(".")
        raise PlaceError(
            f"--device {name} cannot be computed on ({reason}); give cpu, or cuda where each "
            "process has a GPU."
        ) from error
    return device
