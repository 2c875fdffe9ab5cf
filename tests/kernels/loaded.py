"""A loaded network for the tests of kernels, and what holds for its linear modules."""

import pytest
import torch
from kernels.weights import ON_CPU
from nets import ALL_BIT_WIDTHS, with_rows
from torch import nn

import plyweight
from plyweight.artifact import MemorySource
from plyweight.codec import decode, from_planes
from plyweight.kernels import MODES
from plyweight.kernels.reference import error_bound, int8_product
from plyweight.loading import load
from plyweight.nn.packed import PackedLinear, PackedWeight
from plyweight.packing import pack

kernels = pytest.mark.parametrize("kernel", [name for name in ON_CPU if name != "reference"])
CHOICES = [
    (name, mode) for name in ON_CPU for mode in MODES if (name, mode) != ("reference", "float")
]
choices = pytest.mark.parametrize(("kernel", "mode"), CHOICES)


class Net(nn.Module):
    """Linear modules with groups, a pin and a bias of every kind, an embedding tied to the last."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 24)
        self.first = nn.Linear(24, 40)
        self.second = nn.Linear(40, 24, bias=False)
        self.head = nn.Linear(24, 11)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        x = torch.relu(self.first(self.embedding(ids)))
        return self.head(self.second(x))


IDS = torch.arange(12).reshape(3, 4) % 11


def packed_net(folder, *, rows=True, **options):
    torch.manual_seed(0)
    model = plyweight.prepare(Net(), bit_widths=ALL_BIT_WIDTHS, activations=None, **options)
    path = folder / "net"
    pack(with_rows(model) if rows else model, path)
    return path.read_bytes()


def loaded(data, bit_width=None, **options):
    return load(MemorySource(data), Net(), bit_width=bit_width, **options)


def weights_of(net):
    return {n: m for n, m in net.named_modules() if isinstance(m, PackedWeight)}


def assert_linear_modules_compute_the_product(net, mode):
    """Each by itself, on inputs of its own: the reference product with the values of its weight."""
    for module in net.modules():
        if isinstance(module, PackedLinear):
            x = torch.randn(2, 5, module.in_features)
            y, packed = module(x), module.packed_weight
            assert y.shape == (2, 5, module.out_features)
            own = packed.own_bit_width(packed.bit_width)
            planes = [packed.planes_of(layer) for layer in range(packed.num_held)]
            rows = [row.numpy() for part in planes if part is not None for row in part][:own]
            levels = decode(from_planes(rows, packed.shape), own)
            scale = PackedWeight.scale_at(packed, own).numpy()
            bias = 0 if module.bias is None else module.bias.detach()
            arguments = x.reshape(10, -1).numpy(), levels, scale, packed.group_size
            if mode == "int8":
                expected = torch.from_numpy(int8_product(*arguments)).view(y.shape) + bias
                assert torch.equal(y, expected)
            else:
                exact = nn.functional.linear(x, module.weight)
                bound = 2 * error_bound(*arguments) + 1e-6  # torch sums in float32 too
                difference = (y - bias - exact).reshape(10, -1).abs()
                assert (difference.double() <= torch.from_numpy(bound)).all()
