"""How soon does a device compute, and what does each further bit cost it?

    python benchmarks/delivery.py                  # about ten minutes
    python benchmarks/delivery.py --only verify    # a part of it

link     A ResNet-18 for 32 x 32 images (11 M weights, widths 2, 3, 4, 6, 8, untrained: bytes and
         times do not depend on values) is fetched at 2 bits, loaded and run, then upgraded to each
         further width and run again: seconds from the start to each answer, and bytes. Beside it,
         on the same link, the same loading of a whole file for each width, fetched by curl and by
         huggingface_hub's plain GET: what one has to do where every width is a file of its own.
         Those files are the artifact's own prefixes, so the bytes of a width are the same.
         Unshaped loopback, and shaped to 10 Mbit/s and 50 ms (shaped_link.py).
verify   What a reader does before it uses a byte of an artifact of 512 MB, on one core, against
         hashlib.sha256 of the same bytes, sha256sum and cp; files in the page cache. The chunk
         digests are what it checks, so every byte is hashed once. `plyweight verify` also looks
         whether a layer's own digest is that of its bytes, as the format asks of verification,
         and hashes twice (in two threads; it is CPU time that counts here).

All variants in one run, one after the other in turn, medians.
"""

import argparse
import contextlib
import hashlib
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from urllib.parse import urlsplit

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT.parent / "examples"))

import numpy as np
import torch
from cifar10_nets import NETS
from results_files import write_results
from shaped_link import ShapedLink
from torch import nn

import plyweight
from plyweight.artifact import (
    ArtifactReader,
    Header,
    LayerContent,
    LayeredWeight,
    ModelInfo,
    TensorData,
    write_artifact,
)
from plyweight.delivery.cache import Cache
from plyweight.delivery.fetch import fetch
from plyweight.delivery.server import serve
from plyweight.errors import TrustWarning

RESULTS = ROOT / "results"
BIT_WIDTHS = (2, 3, 4, 6, 8)
LINKS = {"loopback": None, "10 Mbit/s, 50 ms": (10.0, 50.0)}
VERIFY_BYTES = 512 * 10**6


def main() -> None:
    """Measure, print the tables, and write them with their conditions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=["link", "verify"], nargs="+", default=["link", "verify"])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    warnings.simplefilter("ignore", TrustWarning)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = {
            name: {"link": link_rows, "verify": verify_rows}[name](Path(folder), options.rounds)
            for name in options.only
        }
    tables = {"link": link_table, "verify": verify_table}
    page = "\n\n".join(tables[name](rows) for name, rows in found.items())
    print(page)
    write(options, page, found)


# --- over a link -----------------------------------------------------------------------------


def link_rows(folder: Path, rounds: int) -> list[dict]:
    """Seconds and bytes of every variant on every link, medians of the rounds."""
    name = "resnet18.layered.safetensors"
    published = folder / "published"
    published.mkdir()
    net = NETS["resnet18"](10)
    model = plyweight.prepare(net, BIT_WIDTHS).eval()
    model(torch.zeros(1, 3, 32, 32))  # activations take their kind from a first batch
    plyweight.pack(model, published / name)
    header = Header.parse((published / name).read_bytes())
    for bit_width in BIT_WIDTHS:
        whole = (published / name).read_bytes()[: header.prefix_bytes(bit_width)]
        (published / f"{bit_width}.safetensors").write_bytes(whole)
    samples: dict[tuple[str, str], list[list[tuple[float, int]]]] = {}
    with serve(published, port=0) as server:
        port = urlsplit(server.url).port
        for _ in range(rounds):
            for link, shape in LINKS.items():
                with link_to(port, shape) as at:
                    for peer, run in VARIANTS.items():
                        with tempfile.TemporaryDirectory(dir=folder) as own:
                            steps = run(f"http://127.0.0.1:{at}", name, net, Path(own))
                        samples.setdefault((link, peer), []).append(steps)
    return [
        {
            "link": link,
            "variant": peer,
            "bit_width": bit_width,
            "seconds": statistics.median(steps[i][0] for steps in found),
            "bytes": statistics.median(steps[i][1] for steps in found),
        }
        for (link, peer), found in samples.items()
        for i, bit_width in enumerate(BIT_WIDTHS)
    ]


@contextlib.contextmanager
def link_to(port: int, shape: tuple[float, float] | None) -> Iterator[int]:
    """The port to connect to."""
    if shape is None:
        yield port
        return
    with ShapedLink(port, mbit_s=shape[0], rtt_ms=shape[1]) as link:
        yield link.port


def layered(base: str, name: str, net: nn.Module, folder: Path) -> list[tuple[float, int]]:
    """Fetch the base, compute; then each further layer, upgrade, compute."""
    started, steps, model = time.perf_counter(), [], None
    for bit_width in BIT_WIDTHS:
        fetched = fetch(f"{base}/{name}", bit_width=bit_width, cache=folder)
        if model is None:
            model = plyweight.load(fetched.artifact, net, bit_width=bit_width)
        else:
            plyweight.upgrade(model, fetched.artifact, bit_width=bit_width)
        compute(model)
        steps.append((time.perf_counter() - started, fetched.transfer.received_bytes))
        started = time.perf_counter()
    return steps


def whole_files(get: Callable[[str, Path], None]) -> Callable[..., list[tuple[float, int]]]:
    """Fetch the whole file of each width with ``get``, load it, compute."""

    def run(base: str, _: str, net: nn.Module, folder: Path) -> list[tuple[float, int]]:
        steps = []
        for bit_width in BIT_WIDTHS:
            started, path = time.perf_counter(), folder / f"{bit_width}.safetensors"
            get(f"{base}/{bit_width}.safetensors", path)
            compute(plyweight.load(path, net))
            steps.append((time.perf_counter() - started, path.stat().st_size))
        return steps

    return run


def by_curl(url: str, path: Path) -> None:
    subprocess.run(["curl", "-sSf", "-o", str(path), url], check=True)


def by_hub(url: str, path: Path) -> None:
    from huggingface_hub.file_download import http_get

    with path.open("wb") as file:
        http_get(url, file)


VARIANTS = {
    "one layered file": layered,
    "a file for each width, curl": whole_files(by_curl),
    "a file for each width, huggingface_hub": whole_files(by_hub),
}


@torch.no_grad()
def compute(model: nn.Module) -> None:
    """One image, one answer."""
    model(torch.zeros(1, 3, 32, 32)).argmax(1).item()


def link_table(rows: list[dict]) -> str:
    """For every link: seconds and MB by variant and width."""
    lines = []
    for link in LINKS:
        lines += [
            f"## {link}: seconds to the first answer, and to that of each further width",
            "",
            f"| variant | {' | '.join(f'{b} bits' for b in BIT_WIDTHS)} | all | MB in all |",
            "|---" * (len(BIT_WIDTHS) + 3) + "|",
        ]
        for variant in VARIANTS:
            own = [r for r in rows if (r["link"], r["variant"]) == (link, variant)]
            cells = [f"{r['seconds']:.2f} s, {r['bytes'] / 1e6:.2f} MB" for r in own]
            seconds, size = (sum(r[key] for r in own) for key in ("seconds", "bytes"))
            line = f"| {variant} | {' | '.join(cells)} | {seconds:.2f} s | {size / 1e6:.2f} |"
            lines.append(line)
        lines.append("")
    return "\n".join(lines).rstrip()


# --- verifying -------------------------------------------------------------------------------


def verify_rows(folder: Path, rounds: int) -> list[dict]:
    """GB/s of each way of reading the same file, by the clock of one core."""
    path = folder / "large.layered.safetensors"
    write_large(path)
    size = path.stat().st_size
    cache = Cache(folder / "cache")
    fetched = fetch(path, cache=cache)
    artifact_id = fetched.header.artifact_id
    raw = path.read_bytes()

    def verify_and_map() -> None:
        with contextlib.closing(cache.open(artifact_id)) as artifact:
            reader = ArtifactReader(artifact)
            for index in range(len(reader.header.layers)):
                reader.read_layer(index)

    def read_and_verify() -> None:
        reader = ArtifactReader(path)
        for index in range(len(reader.header.layers)):
            reader.read_layer(index)

    variants: dict[str, Callable[[], object]] = {
        "verify and map, cache": verify_and_map,
        "read and verify, file": read_and_verify,
        "plyweight verify, file": lambda: ArtifactReader(path).verify(),
        "hashlib.sha256, memory": lambda: hashlib.sha256(raw).digest(),
        "sha256sum, file": lambda: subprocess.run(
            ["sha256sum", str(path)], check=True, stdout=subprocess.DEVNULL
        ),
        "cp, file": lambda: subprocess.run(["cp", str(path), str(folder / "copy")], check=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for run in variants.values():
        run()
    for _ in range(max(rounds, 5)):
        for name, run in variants.items():
            before = cpu_seconds()
            run()
            seconds[name].append(cpu_seconds() - before)
    return [
        {"variant": name, "gb_per_s": size / statistics.median(found) / 1e9}
        for name, found in seconds.items()
    ]


def cpu_seconds() -> float:
    """What this process and its children spent on a CPU: other work here changes it little."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def write_large(path: Path) -> None:
    """One weight, three planes in the base and five in a second layer, random bits."""
    rng = np.random.default_rng(0)
    rows = VERIFY_BYTES // 8192
    weight = LayeredWeight((rows, 8192))
    layers = []
    for bit_width, planes in ((3, 3), (8, 5)):
        bits = rng.integers(0, 256, (planes, weight.plane_bytes), dtype=np.uint8)
        tensors = [TensorData("w.q", "U8", bits.shape, bits.tobytes())]
        if not layers:
            scale = np.ones(rows, "<f4")
            tensors.append(TensorData("w.scale", "F32", scale.shape, scale.tobytes()))
        layers.append(LayerContent(bit_width, tensors))
    model = ModelInfo(name="large", revision=0, created_by="benchmarks/delivery.py")
    write_artifact(path, layers=layers, weights={"w": weight}, activations={}, model=model)


def verify_table(rows: list[dict]) -> str:
    """GB/s, and the ratio to a bare SHA-256."""
    raw = next(r["gb_per_s"] for r in rows if r["variant"].startswith("hashlib"))
    lines = ["## Verifying, GB/s per core", "", "| | GB/s | to hashlib.sha256 |", "|---|---|---|"]
    lines += [f"| {r['variant']} | {r['gb_per_s']:.2f} | {r['gb_per_s'] / raw:.2f} |" for r in rows]
    return "\n".join(lines)


def write(options: argparse.Namespace, page: str, found: dict[str, list[dict]]) -> None:
    """Tables and figures, with their conditions, to benchmarks/results/."""
    conditions = {
        "command": f"python benchmarks/delivery.py --rounds {options.rounds}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, 1 thread",
        "versions": {
            "python": platform.python_version(),
            **{n: version(n) for n in ("plyweight", "torch", "httpx2", "huggingface_hub")},
            "curl": subprocess.run(
                ["curl", "--version"], check=True, capture_output=True, text=True
            ).stdout.split()[1],
        },
        "date": time.strftime("%Y-%m-%d"),
    }
    text = (
        f"# Delivery\n\n{page}\n\n`{conditions['command']}` · {conditions['machine']} · torch "
        f"{version('torch')} · {conditions['date']} · medians; details in delivery.json\n"
    )
    write_results(RESULTS, "delivery", text, {"conditions": conditions, **found})


if __name__ == "__main__":
    main()
