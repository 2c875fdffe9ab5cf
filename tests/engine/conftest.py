"""An artifact with a graph that was made by hand, and what it answers."""

import pytest
from engine.handmade import BIT_WIDTHS, images, residual_graph, write

import plyweight


@pytest.fixture(scope="session")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("engine") / "net.layered.safetensors"
    write(path, residual_graph())
    return path


@pytest.fixture(scope="session")
def expected(path):
    """The logits of each bit-width, from an engine that holds no more than that."""
    found = {}
    for bit_width in BIT_WIDTHS:
        with plyweight.open(path, bit_width=bit_width, threads=1) as engine:
            found[bit_width] = engine.run({"input": images()})["logits"]
    return found
