"""Large tensors on pages of their own."""

import mmap

import pytest
import torch

from plyweight.nn import pages


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 3), (1024, 1024), (1025, 1023)], ids=str)
def test_a_tensor_has_its_shape_and_can_be_filled(shape, dtype):
    tensor = pages.empty(shape, dtype).fill_(3)
    assert (tuple(tensor.shape), tensor.dtype) == (shape, dtype)
    assert bool((tensor == 3).all())


def test_what_fills_a_page_has_its_own_and_the_system_may_refuse(monkeypatch):
    asked = []

    def refused(*arguments):
        asked.append(arguments[1])
        raise OSError("no memory")

    monkeypatch.setattr(mmap, "mmap", refused)
    assert pages.empty((1024, 511), torch.float32).shape == (1024, 511)
    assert asked == []
    assert pages.empty((1024, 513), torch.float32).shape == (1024, 513)
    assert asked == [2 * pages.PAGE_BYTES]
