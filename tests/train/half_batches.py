"""A few steps of once-QAT on two processes, or on one that sees both halves of every batch.

    python half_batches.py RANK FOLDER      one of the two; leaves FOLDER/RANK.pt

Not a test: `test_distributed.py` starts it, and computes the same in its own process.
"""

import sys
from pathlib import Path

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from plyweight.errors import LossError
from plyweight.nn import prepare
from plyweight.train import JointObjective, moment_penalty, parameter_groups

__all__ = ["BALANCES", "alone", "halves", "prepared", "shared"]

BIT_WIDTHS = (2, 4, 8)
BALANCES = ("mean", "mgda", "upgrad")
NUM_STEPS, HALF = 3, 4

State = dict[str, Tensor]


class Net(nn.Module):
    """Inputs of every kind, and no batch norm, whose statistics would be those of a half."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)  # signed inputs
        self.hidden = nn.Linear(36, 8)  # unsigned
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)  # a little below zero

    def forward(self, images: Tensor) -> Tensor:
        """``(batch, 2, 5, 5)`` to logits ``(batch, 3)``."""
        x = F.relu(self.conv(images)).flatten(start_dim=1)
        return self.head(F.gelu(4 * self.norm(self.hidden(x))))


def halves(step: int) -> list[tuple[Tensor, Tensor]]:
    """The two halves of the batch of a step; the second one is larger in magnitude."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(2, HALF, 2, 5, 5, generator=generator)
    labels = torch.randint(0, 3, (2, HALF), generator=generator)
    return [(images[0], labels[0]), (3 * images[1], labels[1])]


def prepared() -> nn.Module:
    """The same layered net in every process."""
    torch.manual_seed(0)
    return prepare(Net(), BIT_WIDTHS, pinned={"head": 4})


def shared(balance: str, rank: int) -> State:
    """What a process that sees one half of every batch comes to."""
    model = prepared()
    network = DistributedDataParallel(model)
    objective = JointObjective(network, F.cross_entropy, balance=balance)
    optimizer = sgd(model)
    for step in range(NUM_STEPS):
        images, labels = halves(step)[rank]
        objective.backward(images, labels)
        finish(model, optimizer)
    return model.state_dict()


def alone(balance: str) -> State:
    """What one process that sees both comes to; for the mean, one after the other."""
    model = prepared()
    model(halves(0)[0][0])  # activation steps start from the first half, as in the first process
    objective = JointObjective(model, F.cross_entropy, balance=balance)
    optimizer = sgd(model)
    for step in range(NUM_STEPS):
        if balance == "mean":
            for images, labels in halves(step):
                objective.backward(images, labels, scale_loss=lambda loss: loss / 2)
        else:  # what is balanced is the gradient of the whole batch
            images, labels = (torch.cat(parts) for parts in zip(*halves(step), strict=True))
            objective.backward(images, labels)
        finish(model, optimizer)
    return model.state_dict()


def stopped(rank: int) -> dict[str, object]:
    """What becomes of a process when the other one's images have a NaN in the second step."""
    model = prepared()
    objective = JointObjective(DistributedDataParallel(model), F.cross_entropy)
    optimizer = sgd(model)
    for step in range(NUM_STEPS):
        images, labels = halves(step)[rank]
        if step == 1 and rank == 1:
            images = images * float("nan")
        try:
            objective.backward(images, labels)
        except LossError as error:
            return {
                "step": error.step,
                "bit_width": error.bit_width,
                "module": error.module,
                "message": str(error),
                "state": model.state_dict(),
            }
        finish(model, optimizer)
    return {}


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """With momentum and decay, which see more than the gradient of one step."""
    groups = parameter_groups(model, weight_decay=1e-2)
    return torch.optim.SGD(groups, lr=0.05, momentum=0.9)


def finish(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """A penalty, which all processes compute alike, and the step."""
    (0.01 * moment_penalty(model)).backward()
    optimizer.step()
    optimizer.zero_grad()


def main(rank: int, folder: Path) -> None:
    """Be one of the two processes."""
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    found = {balance: shared(balance, rank) for balance in BALANCES}
    torch.save(found | {"stopped": stopped(rank)}, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
