"""run and bench: an artifact answers, without torch; how fast it does."""

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plyweight.cli.calling import (
    AllowHttp,
    ArtifactId,
    AsJson,
    Authorities,
    CacheFolder,
    PublicKey,
    print_json,
    refuse_together,
    spoken_warnings,
    token,
)
from plyweight.cli.pictures import read_input, top
from plyweight.cli.show import size, table
from plyweight.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from plyweight.artifact import Port
    from plyweight.delivery import FetchOptions
    from plyweight.engine import Engine

__all__ = ["bench", "run"]

Model = Annotated[
    str, typer.Argument(metavar="FILE", help="An artifact, whole or a prefix; or its URL.")
]
BitWidth = Annotated[
    int | None,
    typer.Option("--bit-width", "-b", min=1, max=8, metavar="N", help="By default the widest."),
]
Threads = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Of a request; by default the runtime's choice."),
]
Providers = Annotated[
    list[str] | None,
    typer.Option("--provider", metavar="NAME", help="Of ONNX Runtime; repeatable."),
]
Backend = Annotated[str, typer.Option("--backend", metavar="NAME", help="onnxruntime or openvino.")]
WARM_BYTES = 2**40  # a benchmark keeps every width
TURNS, SETTLING_S = 5, 0.1  # of each width in a benchmark, and before it is timed in each


def run(
    artifact: Model,
    inputs: Annotated[
        list[str],
        typer.Option(
            "--input", metavar="[NAME=]FILE", help="An array (.npy) or a picture; repeatable."
        ),
    ],
    bit_width: BitWidth = None,
    best: Annotated[int, typer.Option("--top", min=1, metavar="N", help="Classes to show.")] = 5,
    threads: Threads = None,
    providers: Providers = None,
    backend: Backend = "onnxruntime",
    artifact_id: ArtifactId = None,
    public_key: PublicKey = None,
    authorities: Authorities = None,
    cache: CacheFolder = None,
    allow_http: AllowHttp = False,
    as_json: AsJson = False,
) -> None:
    """Answer one request at one bit-width, without torch."""
    refuse_together(public_key=public_key, authority=authorities)
    from plyweight.engine import open as open_engine

    options = _fetch_options(artifact, artifact_id, public_key, authorities, cache, allow_http)
    with (
        spoken_warnings(),
        open_engine(
            artifact,
            bit_width=bit_width,
            threads=threads,
            providers=providers,
            backend=backend,
            **options,
        ) as engine,
    ):
        feeds = _feeds(inputs, engine)
        started = time.perf_counter()
        outputs = engine.run(feeds)
        seconds = time.perf_counter() - started
        labels, computed_at = _labels(engine.io), engine.bit_width
    found = {name: _described(value, best, labels) for name, value in outputs.items()}
    if as_json:
        print_json({"bit_width": computed_at, "seconds": seconds, "outputs": found})
        return
    for name, output in found.items():
        shape = " x ".join(map(str, output["shape"]))
        typer.echo(f"{name}  {output['dtype']} {shape}  {computed_at} bits  {seconds * 1e3:.2f} ms")
        for item in output.get("top", ()):
            rows = [(row["label"], f"{row['logit']:.3f}", f"{row['share']:.1%}") for row in item]
            typer.echo(table(("label", "logit", "share"), rows, left={0}))


def bench(
    artifact: Model,
    bit_width: BitWidth = None,
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Inputs of a request.")] = 1,
    runs: Annotated[int, typer.Option(min=1, metavar="N", help="Requests at each width.")] = 50,
    threads: Threads = None,
    providers: Providers = None,
    backend: Backend = "onnxruntime",
    as_json: AsJson = False,
) -> None:
    """Measure what a request takes at every bit-width, and a change."""
    from plyweight.engine import open as open_engine

    started = time.perf_counter()
    with open_engine(
        artifact,
        bit_width=bit_width,
        threads=threads,
        providers=providers,
        backend=backend,
        warm_bytes=WARM_BYTES,
    ) as engine:
        open_s = time.perf_counter() - started
        feeds = _random_feeds(engine.inputs, batch)
        cold_s = dict(_cold_switches(engine))
        times_s, warm_s = _in_turns(engine, feeds, runs)
        report = engine.report()
    rows = [
        {
            "bit_width": b,
            "median_s": statistics.median(times_s[b]),
            "min_s": min(times_s[b]),
            "max_s": max(times_s[b]),
            "per_s": batch / statistics.median(times_s[b]),
            "cold_switch_s": cold_s.get(b),
            "warm_switch_s": statistics.median(warm_s[b]),
        }
        for b in report.bit_widths
    ]
    if as_json:
        print_json(
            {
                "open_s": open_s,
                "batch": batch,
                "runs": runs,
                "backend": report.backend,
                "providers": list(report.providers),
                "held_bytes": report.held_bytes,
                "resident_bytes": report.resident_bytes,
                "rows": rows,
            }
        )
        return
    typer.echo(_bench_table(rows))
    typer.echo(
        f"\nopened in {open_s * 1e3:.1f} ms  layers {size(report.held_bytes)}  with the sessions "
        f"of all widths {size(report.resident_bytes)}  batch {batch}, {runs} requests each, "
        "in turns"
    )


# --- run ----------------------------------------------------------------------------------------


def _fetch_options(
    artifact: str,
    artifact_id: str | None,
    public_key: Path | None,
    authorities: Sequence[Path] | None,
    cache: Path | None,
    allow_http: bool,
) -> "FetchOptions":
    """Those that were given; most of them are for URLs alone."""
    from plyweight.delivery import is_remote

    options: FetchOptions = {}
    if artifact_id is not None:
        options["artifact_id"] = artifact_id
    if public_key is not None:
        options["public_key"] = public_key
    if authorities:
        options["authorities"] = authorities
    if cache is not None:
        options["cache"] = cache
    if allow_http:
        options["allow_http"] = True
    if is_remote(artifact):
        options["token"] = token()
    return options


def _feeds(inputs: Sequence[str], engine: "Engine") -> dict[str, "NDArray[Any]"]:
    """What ``--input`` names, by name of the input."""
    ports = {port.name: port for port in engine.inputs}
    feeds = {}
    for text in inputs:
        name, separator, path = text.partition("=")
        if not separator:
            if len(ports) > 1:
                raise InputError(
                    f"the model has the inputs {', '.join(ports)}; give each as NAME=FILE."
                )
            name, path = next(iter(ports)), text
        if name not in ports:
            raise InputError(f"{name!r} is no input; the model expects {', '.join(ports)}.")
        feeds[name] = read_input(Path(path), ports[name], engine.io)
    return feeds


def _labels(io: Mapping[str, Any]) -> list[str]:
    labels = io.get("labels")
    if not isinstance(labels, list):
        return []
    # They come from whoever made the artifact, and go to a terminal.
    return ["".join(c if c.isprintable() else "?" for c in str(label)) for label in labels]


def _described(value: "NDArray[Any]", best: int, labels: Sequence[str]) -> dict[str, Any]:
    """Shape and dtype of an output, and the best classes where it has a row for each input."""
    found: dict[str, Any] = {"dtype": str(value.dtype), "shape": list(value.shape)}
    if value.ndim == 2 and value.dtype.kind == "f":
        found["top"] = [top(row, best, labels) for row in value]
    return found


# --- bench --------------------------------------------------------------------------------------


def _random_feeds(ports: Sequence["Port"], batch: int) -> dict[str, "NDArray[Any]"]:
    """Numbers of a normal distribution, or zeros where integers are wanted."""
    import numpy as np

    rng = np.random.default_rng(0)
    feeds = {}
    for port in ports:
        # The first dimension with a name is the batch; others are as short as they can be.
        names = [dim for dim in port.shape if isinstance(dim, str)]
        lengths = dict.fromkeys(names, 1) | dict.fromkeys(names[:1], batch)
        shape = tuple(lengths[dim] if isinstance(dim, str) else dim for dim in port.shape)
        dtype = np.dtype(port.dtype)
        is_float = dtype.kind == "f"
        feeds[port.name] = (rng.normal(size=shape) if is_float else np.zeros(shape)).astype(dtype)
    return feeds


def _cold_switches(engine: "Engine") -> Iterator[tuple[int, float]]:
    """How long it takes to go to each bit-width that has no session yet."""
    for bit_width in engine.bit_widths:
        if bit_width != engine.bit_widths[-1]:
            started = time.perf_counter()
            engine.set_bit_width(bit_width)
            yield bit_width, time.perf_counter() - started


def _in_turns(
    engine: "Engine", feeds: Mapping[str, "NDArray[Any]"], runs: int
) -> tuple[dict[int, list[float]], dict[int, list[float]]]:
    """Seconds of each request and of each warm switch, by bit-width, one width after another.

    A turn begins with requests that are not timed: the threads of the width before spin for some
    40 ms, and a thread that wakes up may share the caller's core for longer.
    """
    times: dict[int, list[float]] = {b: [] for b in engine.bit_widths}
    switches: dict[int, list[float]] = {b: [] for b in engine.bit_widths}
    turns = min(TURNS, runs)
    for turn in range(turns):
        for bit_width in engine.bit_widths:
            started = time.perf_counter()
            engine.set_bit_width(bit_width)
            switches[bit_width].append(time.perf_counter() - started)
            settled = time.perf_counter() + SETTLING_S
            engine.run(feeds)  # the first request of a session takes memory
            while time.perf_counter() < settled:
                engine.run(feeds)
            for _ in range(runs * turn // turns, runs * (turn + 1) // turns):
                started = time.perf_counter()
                engine.run(feeds)
                times[bit_width].append(time.perf_counter() - started)
    return times, switches


def _bench_table(rows: Sequence[Mapping[str, Any]]) -> str:
    def ms(seconds: float | None) -> str:
        return "" if seconds is None else f"{seconds * 1e3:.3f}"

    head = ("bit-width", "median ms", "min", "max", "inputs/s", "cold switch ms", "warm switch ms")
    cells = [
        (
            str(row["bit_width"]),
            ms(row["median_s"]),
            ms(row["min_s"]),
            ms(row["max_s"]),
            f"{row['per_s']:.0f}",
            ms(row["cold_switch_s"]),
            ms(row["warm_switch_s"]),
        )
        for row in rows
    ]
    return table(head, cells, left=set())
