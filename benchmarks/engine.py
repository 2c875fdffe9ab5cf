"""How fast does the engine answer, load and switch, beside other runtimes on the same nets?

    python benchmarks/engine.py
    python benchmarks/engine.py --nets resnet18 --add     one more net for the page that is there
    python benchmarks/engine.py --quick --out FOLDER

ResNet-20 for images of 32 x 32, ResNet-18 and MobileNetV2 for 224 x 224. The weights are random,
with batch norm statistics of random images: what is measured does not depend on them. All with two
threads, interleaved in one run, each in turn as turns.py says, of which the round keeps the median.

How far apart two virtual cores are changes every few seconds on some hosts, for all variants alike:
what counts is the median of two variants' ratios in the same round; beside it stands the ratio of
their medians.

Memory, loading and switching are measured in a process of their own, one for each backend.
"""

import argparse
import gc
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

THREADS = 2
os.environ["OMP_NUM_THREADS"] = str(THREADS)
ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT.parent / "examples"))

import numpy as np
from engine_tables import Net, page
from results_files import write_results
from turns import seconds, turn

import plyweight

BIT_WIDTHS, BATCHES, BACKENDS = (2, 3, 4, 6, 8), (1, 8), ("onnxruntime", "openvino")
ACTIVATIONS = ("match", 8)  # as wide as the weights, and 8 bits at every bit-width
SIZES = {"resnet20": 32, "resnet18": 224, "mobilenetv2": 224}
ROUNDS = 12
WARM = 2**40
COLD_ROUNDS = 5

Run = Callable[[np.ndarray], object]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every net, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", choices=list(SIZES), nargs="+", default=list(SIZES))
    parser.add_argument("--add", action="store_true", help="keep the nets that are in FOLDER")
    parser.add_argument("--quick", action="store_true", help="two rounds: whether it runs at all")
    parser.add_argument("--out", type=Path, default=ROOT / "results", metavar="FOLDER")
    parser.add_argument("--holding", nargs=3, help=argparse.SUPPRESS)  # of the process for memory
    options = parser.parse_args(arguments)
    if options.holding:
        path, backend, side = options.holding
        print(json.dumps(holding(path, backend, int(side))))
        return
    found = {name: measured(name, quick=options.quick) for name in options.nets}
    write(found, options)


def measured(name: str, *, quick: bool) -> Net:
    """Everything about one net."""
    side = SIZES[name]
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        variants, path = made(name, folder)
        rounds = 2 if quick else ROUNDS
        latency = {str(batch): interleaved(variants, batch, side, rounds) for batch in BATCHES}
        held = {}
        for backend in BACKENDS:
            command = [sys.executable, __file__, "--holding", str(path), backend, str(side)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            held[backend] = json.loads(done.stdout)
    return {"side": side, "rounds": rounds, "seconds": latency, "holding": held}


def made(name: str, folder: Path) -> tuple[dict[str, Run], Path]:
    """Every variant, ready to answer, and the artifact with narrow activations."""
    import nncf
    import openvino
    import torch
    from engine_nets import net_of
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    torch.set_num_threads(THREADS)
    net, images = net_of(name, SIZES[name]), images_of(16, SIZES[name])
    examples = torch.from_numpy(images)
    paths = {}
    for activations in ACTIVATIONS:
        model = plyweight.prepare(net, BIT_WIDTHS, activations=activations).eval()
        with torch.no_grad():
            model(examples)
        paths[activations] = folder / f"{activations}.layered.safetensors"
        plyweight.pack(model, paths[activations], example_inputs=examples)
    floats, ready, integers = (folder / f"{kind}.onnx" for kind in ("float", "ready", "int8"))
    batch = torch.export.Dim("batch")
    torch.onnx.export(
        net,
        (examples[:2],),
        floats,
        input_names=["input"],
        dynamo=True,
        dynamic_shapes=({0: batch},),
        external_data=False,
        verbose=False,
    )
    quant_pre_process(floats, ready, skip_symbolic_shape=True)

    class Images(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = [{"input": images[i : i + 4]} for i in range(0, len(images), 4)]

        def get_next(self) -> dict[str, np.ndarray] | None:
            return self.left.pop() if self.left else None

    quantize_static(
        ready,
        integers,
        Images(),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,  # the form that x86 multiplies fastest
        weight_type=QuantType.QInt8,
        per_channel=True,
    )
    compiled = torch.compile(net)

    def in_torch(module: Callable[[torch.Tensor], torch.Tensor]) -> Run:
        def run(x: np.ndarray) -> object:
            with torch.inference_mode():
                return module(torch.from_numpy(x))

        return run

    def in_openvino(file: Path | openvino.Model) -> Run:
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": THREADS,
        }
        request = openvino.Core().compile_model(file, "CPU", settings).create_infer_request()
        return lambda x: request.infer([x], share_inputs=True)

    variants = {
        "torch float": in_torch(net),
        "torch float, compiled": in_torch(compiled),
        "ONNX Runtime float": in_onnxruntime(floats),
        "ONNX Runtime int8": in_onnxruntime(integers),
        "OpenVINO float": in_openvino(floats),
        "OpenVINO int8": in_openvino(integers),
        "OpenVINO int8 by NNCF": in_openvino(
            nncf.quantize(
                openvino.Core().read_model(floats),
                nncf.Dataset([images[i : i + 4] for i in range(0, len(images), 4)]),
                subset_size=len(images) // 4,
            )
        ),
    }
    for bit_width in reversed(BIT_WIDTHS):
        exported = folder / f"{bit_width}.onnx"
        plyweight.export(paths["match"], exported, bit_width=bit_width, to="onnx")
        variants[f"OpenVINO W{bit_width}A{bit_width}"] = in_openvino(exported)
    for backend, activations in itertools.product(BACKENDS, ACTIVATIONS):
        for bit_width in reversed(BIT_WIDTHS):
            name = f"plyweight {backend} W{bit_width}A{8 if activations == 8 else bit_width}"
            if name not in variants:  # at 8 bits both are the same
                variants[name] = in_plyweight(paths[activations], bit_width, backend)
    return variants, paths["match"]


def in_plyweight(path: Path, bit_width: int, backend: str) -> Run:
    """An engine."""
    engine = plyweight.open(path, bit_width=bit_width, threads=THREADS, backend=backend)
    port = engine.inputs[0].name
    return lambda x: engine.run({port: x})


def in_onnxruntime(file: Path) -> Run:
    """A session on a file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = THREADS, 3
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"input": x})


def images_of(count: int, side: int) -> np.ndarray:
    """``(count, 3, side, side)`` of a normal distribution."""
    return np.random.default_rng(0).normal(size=(count, 3, side, side)).astype(np.float32)


def interleaved(
    variants: Mapping[str, Run], batch: int, side: int, rounds: int
) -> dict[str, list[float]]:
    """The median seconds of a request in every round, one variant after the other."""
    x = images_of(batch, side)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for run in variants.values():
        run(x)  # which may compile
    for _ in range(rounds):
        for name, run in variants.items():
            times[name].append(statistics.median(turn(lambda run=run: run(x))))
    return times


def holding(path: str, backend: str, side: int) -> dict[str, Any]:
    """Seconds to load and to switch, and resident bytes, in a process that does nothing else."""
    options: dict[str, Any] = {"threads": THREADS, "backend": backend, "warm_bytes": WARM}
    plyweight.open(path, bit_width=BIT_WIDTHS[0], **options).close()  # loads the libraries
    gc.collect()
    before, x = resident_bytes(), images_of(1, side)
    started = time.perf_counter()
    with plyweight.open(path, **options) as engine:
        (port,) = engine.inputs
        feeds = {port.name: x}
        engine.run(feeds)
        found: dict[str, Any] = {"load_s": time.perf_counter() - started}
        found["loaded_bytes"] = resident_bytes() - before
        inference = [seconds(lambda: engine.run(feeds)) for _ in range(15)]
        found["inference_s"] = statistics.median(inference)
        others = BIT_WIDTHS[-2::-1]
        for bit_width in others:
            engine.set_bit_width(bit_width)
        found["all_warm_bytes"] = resident_bytes() - before
        warm = [seconds(lambda b=b: engine.set_bit_width(b)) for b in BIT_WIDTHS * 20]
        found["warm_s"] = statistics.median(warm)
        engine.downgrade(BIT_WIDTHS[0])
        found["downgraded_bytes"] = resident_bytes() - before
    with plyweight.open(path, **options | {"warm_bytes": 0}) as engine:
        cold: dict[int, list[float]] = {bit_width: [] for bit_width in others}
        for bit_width in others * COLD_ROUNDS:
            cold[bit_width].append(seconds(lambda b=bit_width: engine.set_bit_width(b)))
        found["cold_s"] = {b: statistics.median(times) for b, times in cold.items()}
    return found


def resident_bytes() -> int:
    """Of this process, as Linux counts them."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def write(found: Mapping[str, Net], options: argparse.Namespace) -> None:
    """The page, on the screen and in a file."""
    packages = ("plyweight", "torch", "onnxruntime", "openvino", "nncf")
    conditions = {
        "command": "python benchmarks/engine.py" + (" --quick" if options.quick else ""),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {THREADS} threads",
        "versions": {name: version(name) for name in packages},
        "date": time.strftime("%Y-%m-%d"),
    }
    earlier = options.out / "engine.json"
    kept = json.loads(earlier.read_text(encoding="utf-8"))["nets"] if options.add else {}
    nets = {name: net for name in SIZES if (net := (kept | dict(found)).get(name))}
    text = page(nets, conditions)
    print(text)
    write_results(options.out, "engine", text, {"conditions": conditions, "nets": nets})


if __name__ == "__main__":
    main()
