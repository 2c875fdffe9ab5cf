"""The page of engine.py: tables of what it found, and which marks hold."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = ["Net", "page"]

Net = Mapping[str, Any]  # "side", "rounds", "seconds" by batch and variant, "holding" by backend

OF_INT8, OF_TORCH = 0.97, 4.0  # the marks
OF_TORCH_NETS = ("resnet18", "mobilenetv2")  # for which the second one is set, at batch 1
ONE, EIGHT = "1", "8"  # batches, as JSON has them
PEERS = {"onnxruntime": "ONNX Runtime int8", "openvino": "OpenVINO int8"}
EAGER = "torch float"

INTRODUCTION = """\
# The engine beside other runtimes

Random weights; `int8` is ONNX Runtime's static quantization (QDQ, per channel) of the same net,
on both runtimes. Above 1 is faster. Each speed is the median of the ratios in the same round,
and in brackets the ratio of the medians of all rounds: where the host moves virtual cores, all
of a round are slower alike, which the second does not know. Before a variant is timed in a
round nothing runs, until threads of the variant before have stopped spinning, and then it
answers for 100 ms, until its own have a core each. `W4A8`: weights of 4 bits and activations of
8; `OpenVINO W4A4` is that graph, exported. MB are resident bytes above those of a process with
the libraries loaded.
"""


def page(nets: Mapping[str, Net], conditions: Mapping[str, Any]) -> str:
    """All of it, as Markdown."""
    lines = [INTRODUCTION]
    for name, net in nets.items():
        lines += [f"## {name}, {net['side']} x {net['side']}, {net['rounds']} rounds", ""]
        lines += [*_speeds(net), "", *_marks(name, net), "", *_holding(net), ""]
    packages = " · ".join(f"{n} {v}" for n, v in conditions["versions"].items())
    lines += [f"`{conditions['command']}` · {conditions['machine']} · {packages} · "]
    lines[-1] += conditions["date"]
    return "\n".join(lines) + "\n"


def _speeds(net: Net) -> Iterator[str]:
    yield (
        "| variant | batch 1, ms | speed, of its int8 | of torch | inputs/s, batch 8 | "
        "speed, of its int8 |"
    )
    yield "|---" * 6 + "|"
    for variant, rounds in net["seconds"][ONE].items():
        peer = PEERS["openvino" if "openvino" in variant.lower() else "onnxruntime"]
        rate = int(EIGHT) / statistics.median(net["seconds"][EIGHT][variant])
        yield (
            f"| {variant} | {statistics.median(rounds) * 1e3:.2f} | "
            f"{_shown(net, ONE, variant, peer)} | {_shown(net, ONE, variant, EAGER)} | "
            f"{rate:.0f} | {_shown(net, EIGHT, variant, peer)} |"
        )


def _shown(net: Net, batch: str, variant: str, peer: str) -> str:
    seconds = net["seconds"][batch]
    by_medians = statistics.median(seconds[peer]) / statistics.median(seconds[variant])
    return f"{_speed(net, batch, variant, peer):.2f} ({by_medians:.2f})"


def _speed(net: Net, batch: str, variant: str, peer: str) -> float:
    """How many times as fast as ``peer``: the median of the rounds' ratios."""
    seconds = net["seconds"][batch]
    pairs = zip(seconds[peer], seconds[variant], strict=True)
    return statistics.median(there / here for there, here in pairs)


def _marks(name: str, net: Net) -> Iterator[str]:
    for backend, peer in PEERS.items():
        for batch in (ONE, EIGHT):
            yield _mark(net, backend, batch, OF_INT8, peer)
            if backend == "openvino":
                yield _mark(net, backend, batch, OF_INT8, None)
        if name in OF_TORCH_NETS:
            yield _mark(net, backend, ONE, OF_TORCH, EAGER)


def _mark(net: Net, backend: str, batch: str, least: float, peer: str | None) -> str:
    """Whether every bit-width is that fast; without a peer beside OpenVINO on the same graph."""
    start = f"plyweight {backend} "
    held, lost = [], []
    for variant in net["seconds"][batch]:
        name = variant.removeprefix(start)
        beside = peer or f"OpenVINO {name}"
        if variant.startswith(start) and beside in net["seconds"][batch]:
            (lost if _speed(net, batch, variant, beside) < least else held).append(name)
    verdicts = [f"holds at {_listed(held) if lost else 'every bit-width'}"] if held else []
    if lost:
        verdicts += [f"**lost at {_listed(lost)}**"]
    of = peer or "OpenVINO on the same graph"
    return f"- {backend}, batch {batch}, {least:g} of {of}: {'; '.join(verdicts)}"


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _holding(net: Net) -> Iterator[str]:
    yield (
        "| backend | open to first answer, ms | cold switch, ms (inferences) | "
        "warm switch, µs | MB loaded | MB, all widths warm | MB, downgraded to 2 |"
    )
    yield "|---" * 7 + "|"
    for backend, held in net["holding"].items():
        cold = statistics.median(held["cold_s"].values())
        size = " | ".join(
            f"{held[key] / 1e6:.1f}"
            for key in ("loaded_bytes", "all_warm_bytes", "downgraded_bytes")
        )
        yield (
            f"| {backend} | {held['load_s'] * 1e3:.0f} | {cold * 1e3:.0f} "
            f"({cold / held['inference_s']:.1f}) | {held['warm_s'] * 1e6:.1f} | {size} |"
        )
