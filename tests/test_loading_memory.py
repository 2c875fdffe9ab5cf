"""What a loaded model takes, as the system sees it: the resident memory of fresh processes."""

import json
import subprocess
import sys
import textwrap

import pytest

from plyweight.artifact import ArtifactReader
from plyweight.delivery.budget import Budget

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not sys.platform.startswith("linux"), reason="resident memory is read from /proc"
    ),
]

# 268 M weights, 268 MB of planes at 8 bits. Each weight decodes to 17 MB, which the C library, left
# to itself, keeps in the process when it is freed.
SCRIPT = textwrap.dedent(
    """
    import gc, json, os, sys, torch
    from torch import nn
    import plyweight

    def net(size, number):
        return nn.Sequential(*[nn.Linear(size, size, bias=False) for _ in range(number)])

    def pack(model, path):
        plyweight.pack(plyweight.prepare(model, (2, 4, 8), activations=None), path)

    def resident():
        gc.collect()
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def peak():
        with open("/proc/self/status") as file:
            return next(1024 * int(row.split()[1]) for row in file if row.startswith("VmHWM"))

    path, widths = sys.argv[1], list(map(int, sys.argv[2:]))
    if not widths:
        pack(net(8, 1), path + ".small")
        pack(net(2048, 64), path)
        sys.exit()
    # What Python and torch take themselves is there once a small model has computed.
    with torch.no_grad():
        plyweight.load(path + ".small", net(8, 1))(torch.ones(1, 8))
    before = resident()
    with torch.device("meta"):
        skeleton = net(2048, 64)
    loaded, measured = plyweight.load(path, skeleton, bit_width=widths[0]), []
    for bit_width in widths:
        if measured and bit_width < measured[-1]["bit_width"]:
            plyweight.downgrade(loaded, bit_width)
        else:
            plyweight.upgrade(loaded, path, bit_width=bit_width)
        unused = resident()
        with torch.no_grad():
            loaded(torch.ones(1, 2048))
        measured.append(
            {"bit_width": bit_width, "unused": unused - before, "used": resident() - before,
             "peak": peak() - before}
        )
    print(json.dumps(measured))
    """
)


def run(*arguments):
    command = [sys.executable, "-c", SCRIPT, *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout) if done.stdout else None


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("memory") / "net"
    run(path)
    yield path
    path.unlink()


def test_after_a_downgrade_the_process_is_as_large_as_one_that_never_held_more(path):
    [fresh] = run(path, 2)
    *_, at_8, after = run(path, 2, 4, 8, 2)  # computing at every one
    most = 0.05 * path.stat().st_size
    assert at_8["unused"] - fresh["unused"] > 14 * most  # 6 of 8 planes
    assert abs(after["unused"] - fresh["unused"]) < most
    assert abs(after["used"] - fresh["used"]) < most


@pytest.mark.parametrize("bit_width", [2, 8])
def test_max_ram_is_what_a_model_takes_while_it_computes(path, bit_width):
    [measured] = run(path, bit_width)
    header = ArtifactReader(path).header
    # Pages are 4 KiB here and there, and the peak of a process is counted per thread in bundles.
    margin = 0.05 * path.stat().st_size
    assert Budget(max_ram=measured["peak"] + margin).choose(header).bit_width >= bit_width
    if bit_width > 2:
        assert Budget(max_ram=measured["peak"] - margin).choose(header).bit_width < bit_width
