"""What every test shares. Nothing here needs torch: tests of codes and bytes run without it."""

import functools
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from graph.packed import Packed

# Before torch is imported: nets of tests are tiny, and two threads that wait for each other on a
# busy machine take ten times as long as one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# No deadline: a shared machine is slow now and then, and that is no property of the code.
settings.register_profile("default", deadline=None)
# In CI the same examples every time; elsewhere new ones, and failures are kept for the next run.
settings.register_profile("ci", deadline=None, derandomize=True, database=None)
settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.fixture(autouse=True)
def _same_random_numbers_in_any_order() -> None:
    """Seed torch before every test, if any test has imported it."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda"):
        torch = pytest.importorskip("torch")
        if not torch.cuda.is_available():
            pytest.skip("there is no CUDA device here")


@pytest.fixture(scope="session")
def packed_nets(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], "Packed"]:
    """The small networks of ``graph/packed.py``, each exported once, when it is first asked for."""

    @functools.cache
    def packed_net(name: str) -> "Packed":
        from graph.packed import packed_in

        return packed_in(tmp_path_factory.mktemp(name), name)

    return packed_net
