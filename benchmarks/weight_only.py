"""How fast are products of floats with weights of each bit-width, beside ONNX Runtime's own?

    python benchmarks/weight_only.py
    python benchmarks/weight_only.py --quick --out FOLDER

Networks of square linear modules, one after the other, whose activations stay floats: six with 100
MB of float weights, as much as the last cache of some servers, and 24 with 400. Random weights;
what is measured does not depend on them. One thread, interleaved in one run: in each round every
variant answers one request that is not timed and then some that are. Medians.

"as the graph has it" is the artifact's graph on ONNX Runtime as any other tool would run it; its
own quantization is MatMulNBitsQuantizer in groups of 128, exact in its activations (accuracy level
1), and with activations rounded to 8 bits (level 4), which is what it is fastest with.
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

THREADS = 1
os.environ["OMP_NUM_THREADS"] = str(THREADS)
ROOT = Path(__file__).parent

import numpy as np
from results_files import write_results

import plyweight
from plyweight.engine import Engine

WIDTH, BATCHES = 2048, (1, 16)
DEPTHS = {6: (1, 2, 3, 4, 5, 6, 7, 8), 24: (2, 4, 8)}
GROUPS = {6: (None, 128, 32, 24), 24: (None,)}
GROUPED_WIDTHS = (2, 4, 8)
ROUNDS = {6: 12, 24: 6}
TIMED = 3  # requests of a variant in a round

Run = Callable[[np.ndarray], np.ndarray]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every network, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two rounds: whether it runs at all")
    parser.add_argument("--out", type=Path, default=ROOT / "results", metavar="FOLDER")
    parser.add_argument(
        "--wait", action="store_true", help="wait for a line of input before measuring"
    )
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        variants = {depth: made(depth, Path(folder)) for depth in DEPTHS}
        if options.wait:
            print("ready", flush=True)
            sys.stdin.readline()
        found = {
            depth: {
                batch: interleaved(runs, batch, 2 if options.quick else ROUNDS[depth])
                for batch in BATCHES
            }
            for depth, runs in variants.items()
        }
    write(found, options)


def made(depth: int, folder: Path) -> dict[str, Run]:
    """Every variant, ready to answer."""
    import onnx
    import torch
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    torch.manual_seed(0)
    net = torch.nn.Sequential(
        *(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(depth))
    ).eval()
    with torch.no_grad():
        for module in net:
            module.weight.mul_(3**0.5)  # so that answers are as large as questions
    examples = torch.randn(2, WIDTH)
    floats = folder / f"float{depth}.onnx"
    onnx.save(chain([module.weight.detach().numpy() for module in net]), floats)
    variants: dict[str, Run] = {"ONNX Runtime float": in_onnxruntime(floats)}
    for bits, level in ((4, 1), (4, 4), (8, 1), (8, 4)):
        if level == 1 and bits == 8 and depth > min(DEPTHS):
            continue  # which takes a second, as for the shallow one
        quantizer = MatMulNBitsQuantizer(
            onnx.load(floats), bits=bits, block_size=128, is_symmetric=True, accuracy_level=level
        )
        quantizer.process()
        path = folder / f"own{depth}-{bits}-{level}.onnx"
        quantizer.model.save_model_to_file(str(path))
        rounded = "floats" if level == 1 else "activations of 8 bits"
        variants[f"ONNX Runtime's {bits} bits, {rounded}"] = in_onnxruntime(path)
    for group_size in GROUPS[depth]:
        artifact = packed(net, examples, group_size, folder / f"net{depth}-{group_size}")
        groups = f", groups of {group_size}" if group_size else ""
        for bit_width in DEPTHS[depth] if group_size is None else GROUPED_WIDTHS:
            engine = plyweight.open(artifact, bit_width=bit_width, threads=THREADS)
            (form,) = {form.kind for form in engine.report().forms.values()}
            variants[f"plyweight {bit_width} bits{groups} ({form})"] = answers(engine)
        if group_size is None:
            plain = folder / f"plain{depth}.onnx"
            plyweight.export(artifact, plain, bit_width=8, to="onnx")
            variants["8 bits as the graph has it"] = in_onnxruntime(plain)
            engine = plyweight.open(artifact, bit_width=8, threads=THREADS, backend="openvino")
            variants["plyweight 8 bits, OpenVINO"] = answers(engine)
    return variants


def chain(weights: Sequence[np.ndarray]) -> Any:
    """An ONNX model that multiplies with one float weight ``(out, in)`` after the other."""
    from onnx import TensorProto, helper, numpy_helper

    names = ["input", *(f"x{i}" for i in range(1, len(weights))), "output"]
    nodes = [
        helper.make_node("MatMul", [names[i], f"w{i}"], [names[i + 1]], name=f"product{i}")
        for i in range(len(weights))
    ]
    ports = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", WIDTH])
        for name in (names[0], names[-1])
    ]
    tensors = [
        numpy_helper.from_array(np.ascontiguousarray(weight.T), f"w{i}")
        for i, weight in enumerate(weights)
    ]
    graph = helper.make_graph(nodes, "chain", ports[:1], ports[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def packed(net: Any, examples: Any, group_size: int | None, path: Path) -> Path:
    """An artifact of ``net`` whose activations are not quantized."""
    model = plyweight.prepare(net, DEPTHS[len(net)], activations=None, group_size=group_size).eval()
    plyweight.pack(model, path, example_inputs=examples)
    return path


def answers(engine: Engine) -> Run:
    """What an engine makes of an array."""
    inputs, outputs = engine.inputs[0].name, engine.outputs[0].name
    return lambda x: engine.run({inputs: x})[outputs]


def in_onnxruntime(file: Path) -> Run:
    """A session on a file, which leaves activations floats where nothing says otherwise."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = THREADS, 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x})[0]


def interleaved(variants: Mapping[str, Run], batch: int, rounds: int) -> dict[str, list[float]]:
    """The median, least and most seconds of a request, the variants in turn in every round."""
    x = np.random.default_rng(0).normal(size=(batch, WIDTH)).astype(np.float32)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            run(x)
            for _ in range(TIMED):
                started = time.perf_counter()
                run(x)
                times[name].append(time.perf_counter() - started)
    return {name: [statistics.median(t), min(t), max(t)] for name, t in times.items()}


def tables(found: Mapping[int, Any]) -> list[str]:
    """Lines of Markdown."""
    lines = []
    for depth, by_batch in found.items():
        megabytes = depth * WIDTH * WIDTH * 4 / 1e6
        lines += [f"\n## {depth} modules of {WIDTH} x {WIDTH}, {megabytes:.0f} MB as floats\n"]
        lines += [
            "| variant | batch 1, ms (min-max) | of float | batch 16, ms (min-max) | of float |"
        ]
        lines += ["|---" * 5 + "|"]
        for name in by_batch[BATCHES[0]]:
            cells = []
            for batch in BATCHES:
                median, least, most = (seconds * 1e3 for seconds in by_batch[batch][name])
                speed = by_batch[batch]["ONNX Runtime float"][0] * 1e3 / median
                cells += [f"{median:.2f} ({least:.2f}-{most:.2f})", f"{speed:.2f}"]
            lines += [f"| {name} | " + " | ".join(cells) + " |"]
    return lines


def write(found: Mapping[int, Any], options: argparse.Namespace) -> None:
    """The tables, on the screen and in a file."""
    packages = ("plyweight", "torch", "onnxruntime", "openvino")
    conditions = {
        "command": "python benchmarks/weight_only.py" + (" --quick" if options.quick else ""),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {THREADS} thread",
        "rounds": {str(depth): 2 if options.quick else ROUNDS[depth] for depth in DEPTHS},
        "versions": {name: version(name) for name in packages},
        "date": time.strftime("%Y-%m-%d"),
    }
    lines = ["# Weights of few bits and float activations\n"]
    lines += [
        "Random weights. `of float` is the ratio of medians to ONNX Runtime's float product in"
    ]
    lines += ["the same run; above 1 is faster. What is in brackets is the form of the modules."]
    lines += tables(found)
    packages_line = " · ".join(f"{n} {v}" for n, v in conditions["versions"].items())
    lines += [f"\n`{conditions['command']}` · {conditions['machine']} · {packages_line} · "]
    lines[-1] += f"{conditions['date']}\n"
    print("\n".join(lines))
    content = {"conditions": conditions, "seconds": found}
    write_results(options.out, "weight_only", "\n".join(lines), content)


if __name__ == "__main__":
    main()
