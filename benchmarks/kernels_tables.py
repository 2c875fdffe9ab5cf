"""The pieces that benchmarks/kernels.py measured, as tables."""

from typing import Any

__all__ = ["as_markdown", "short"]

WIDTHS = range(1, 9)
GROUPS = ("-", "128", "32")
MODES = ("int8", "float")
OTHER_WIDTHS = (2, 4, 8)  # that MatMulNBits has
OUT_OF_CACHE = "32768x8192"  # 268 MB at 8 bits


def as_markdown(found: dict[str, Any]) -> str:
    """The page."""
    lines = [
        "# Products with bit planes",
        "",
        "Milliseconds: the median request, and in parentheses the fastest, for others use the",
        "cores too. Ratios are of medians. `x`: how many times as fast, above 1 is faster. `g128`,",
        "`g32`: groups of inputs that share a scale; `g-`: one scale for each output channel.",
        "`int8`: activations are rounded to 8 bits, as ONNX Runtime does at accuracy level 4;",
        "`float`: they are not. All widths of a granularity come from the same planes.",
        "`bandwidth`: of reading as many bytes, at best.",
        "",
        "`python benchmarks/kernels.py --tables` makes this page anew from `kernels.json`, and the",
        "table of README with it; nothing is measured.",
    ]
    pieces = found["pieces"]
    if any("plyweight int8 4 g128" in first_of(piece) for piece in pieces.values()):
        lines += ["", "## In short", "", *short(found)]
        lines += ["", "## One row, beside ONNX Runtime", "", *summary(found)]
    if first_of(pieces.get(f"{OUT_OF_CACHE} 2", EMPTY)):
        lines += ["", "## Time for each bit, out of cache", "", *per_bit_table(found)]
    if "instructions" in found:
        lines += ["", "## Instructions", "", *instructions_table(found["instructions"])]
    if "model" in found:
        lines += ["", "## A loaded model", "", *model_table(found["model"])]
    for name, piece in pieces.items():
        shape, threads = name.split()
        lines += ["", f"## {shape}, {threads} thread{'s' if threads != '1' else ''}"]
        for m, batch in piece["batches"].items():
            lines += ["", f"### m = {m}, {batch['rounds']} rounds", "", *batch_table(piece, m)]
        seconds = piece["conditions"]["seconds"]
        command = f"kernels.py --shape {shape} --threads {threads} --seconds {seconds:g}"
        lines += ["", f"{run_as(command, piece['conditions'])} · kernel {piece['kernel']}"]
    return "\n".join(lines) + "\n"


EMPTY: dict[str, Any] = {"batches": {}}  # a piece that was not measured


def run_as(command: str, conditions: dict[str, Any]) -> str:
    """How a table was made."""
    versions = " · ".join(f"{name} {number}" for name, number in conditions["versions"].items())
    machine, date = conditions["machine"], conditions["date"]
    return f"`python benchmarks/{command}` · {machine} · {versions} · {date}"


def instructions_table(instructions: dict[str, Any]) -> list[str]:
    """A line for each kernel and mode."""
    lines = [
        "Of one row, for each weight, 2048 x 512 in groups of 128, all that a call costs included;",
        "counted by callgrind, for AVX-512 one by one (`python benchmarks/kernels_counted.py`).",
        "",
        f"| kernel | {' | '.join(f'{b} bit' for b in WIDTHS)} |",
        "|---" * 9 + "|",
    ]
    for kernel, modes in instructions.items():
        for mode, counts in modes.items():
            cells = " | ".join(f"{counts[str(b)]:.2f}" for b in WIDTHS)
            lines.append(f"| {kernel}, {mode} | {cells} |")
    return lines


def model_table(model: dict[str, Any]) -> list[str]:
    """What a kernel means for a model."""
    lines = [
        f"{model['weights'] / 1e6:.1f} M weights in 8 linear modules; a plane of all weights is",
        f"{model['weights'] / 8e6:.1f} MB. MB are resident bytes above those of a process with",
        "its libraries. Calls have one row. The longest call is that of another thread, which goes",
        "on calling at 2 bits while the model is upgraded to 8.",
        "",
        "| kernel | call at 2 / 4 / 8 bits, ms | MB at 2 bits | upgrade to 8, ms | longest call "
        "meanwhile, ms | MB at 8 bits | MB downgraded to 2 | switch, µs a module |",
        "|---" * 8 + "|",
    ]
    for row in model["rows"]:
        calls = " / ".join(f"{row[f'call_{b}_s'] * 1e3:.2f}" for b in (2, 4, 8))
        sizes = {
            key: f"{row[f'{key}_bytes'] / 1e6:.1f}"
            for key in ("two_bits", "eight_bits", "downgraded")
        }
        lines.append(
            f"| {row['kernel']}, {row['mode']} | {calls} | {sizes['two_bits']} | "
            f"{row['upgrade_s'] * 1e3:.0f} | {row['longest_wait_s'] * 1e3:.1f} | "
            f"{sizes['eight_bits']} | {sizes['downgraded']} | {row['switch_s'] * 1e6:.2f} |"
        )
    return [*lines, "", run_as("kernels_model.py", model["conditions"])]


def first_of(piece: dict[str, Any]) -> dict[str, float]:
    """The seconds of the first number of rows; none of an empty piece."""
    return seconds_of(piece, next(iter(piece["batches"]), ""))


def seconds_of(piece: dict[str, Any], m: str) -> dict[str, float]:
    """Of the median request of every variant; none where that number of rows was not measured."""
    batch = piece["batches"].get(m, {"seconds": {}})
    return {name: median for name, (median, _, _) in batch["seconds"].items()}


def milliseconds(piece: dict[str, Any], m: str, name: str, form: str = ".3f") -> str:
    """The median of a variant, and its fastest in parentheses."""
    median, fastest, _ = piece["batches"][m]["seconds"][name]
    return f"{median * 1e3:{form}} ({fastest * 1e3:{form}})"


def short(found: dict[str, Any]) -> list[str]:
    """What the README shows: m = 1, groups of 128, int8, the most threads that were measured."""
    lines = [
        "One row, groups of 128, mode int8, milliseconds: the median and (the fastest).",
        "",
        "| weight | threads | one copy of planes, 2 / 3 / 4 / 6 / 8 bits "
        "| ONNX Runtime, 2 / 4 / 8 bits | torch, int4 / int8 | torch, bfloat16 / float32 |",
        "|---" * 6 + "|",
    ]
    for name, piece in found["pieces"].items():
        shape, threads = name.split()
        seconds = seconds_of(piece, "1")
        if threads == "1" or "plyweight int8 2 g128" not in seconds:
            continue
        cells = [
            [f"plyweight int8 {b} g128" for b in (2, 3, 4, 6, 8)],
            [f"ONNX Runtime {b} g128" for b in OTHER_WIDTHS],
            ["torch int4 g128", "torch int8"],
            ["torch bfloat16", "torch float32"],
        ]
        texts = [
            " / ".join(milliseconds(piece, "1", name, ".3g") for name in names) for names in cells
        ]
        lines.append(f"| {shape.replace('x', ' x ')} | {threads} | {' | '.join(texts)} |")
    return lines


def summary(found: dict[str, Any]) -> list[str]:
    """Of m = 1: a line for each shape, number of threads and bit-width that both have."""
    lines = [
        "| out x in | threads | bits | int8 g128, ms | beside ONNX Runtime g128 | g32, ms | beside "
        "ONNX Runtime g32 | to torch float32 |",
        "|---" * 8 + "|",
    ]
    for name, piece in found["pieces"].items():
        shape, threads = name.split()
        seconds = seconds_of(piece, "1")
        for bits in OTHER_WIDTHS:
            if f"plyweight int8 {bits} g128" not in seconds:
                continue
            cells = [shape, threads, str(bits)]
            for group in ("128", "32"):
                own = seconds[f"plyweight int8 {bits} g{group}"]
                other = seconds[f"ONNX Runtime {bits} g{group}"]
                cells.append(milliseconds(piece, "1", f"plyweight int8 {bits} g{group}"))
                cells.append(f"{other / own:.2f} x")
            own = seconds[f"plyweight int8 {bits} g128"]
            cells.append(f"{seconds['torch float32'] / own:.1f} x")
            lines.append(f"| {' | '.join(cells)} |")
    note = (
        "4-6 µs of every call of ONNX Runtime are `session.run` itself (an empty session), which "
        "decides about the small weights. Below 1 ours is slower."
    )
    return [*lines, "", note]


def per_bit_table(found: dict[str, Any]) -> list[str]:
    """Whether fewer bits take less time where planes come from memory."""
    piece = found["pieces"][f"{OUT_OF_CACHE} 2"]
    seconds, sizes = first_of(piece), piece["weight_bytes"]
    heads = [
        (mode, group)
        for mode in MODES
        for group in GROUPS
        if f"plyweight {mode} 8 g{group}" in seconds
    ]
    lines = [
        f"{OUT_OF_CACHE}, 2 threads, m = {next(iter(piece['batches']))}: the time of b bits as a",
        "multiple of b eighths of that of 8 bits. 1: time falls with the bits; above 1 it falls",
        "less, and `8 / b` would be that it does not fall at all. In parentheses the same of the",
        "bytes that are read: a scale for 32 inputs, float32, is a bit more for each weight.",
        "",
        f"| bits | {' | '.join(f'{mode} g{group}' for mode, group in heads)} |",
        "|---" * (len(heads) + 1) + "|",
    ]
    for bits in WIDTHS:
        cells = []
        for mode, group in heads:
            these, of_eight = f"plyweight {mode} {bits} g{group}", f"plyweight {mode} 8 g{group}"
            ratio = seconds[these] / seconds[of_eight]
            by_bytes = ratio * sizes[of_eight] / sizes[these]
            cells.append(f"{ratio * 8 / bits:.2f} ({by_bytes:.2f})")
        lines.append(f"| {bits} | {' | '.join(cells)} |")
    return lines


def batch_table(piece: dict[str, Any], m: str) -> list[str]:
    """Of one number of rows: our bit-widths, then everybody else.

    The slowest granularity of each mode is set beside the faster of torch's two dense products.
    """
    seconds = seconds_of(piece, m)
    dense = min(seconds["torch float32"], seconds["torch bfloat16"])
    lines = []
    if "plyweight int8 1 g-" in seconds:
        heads = [f"{mode} g{group}" for mode in MODES for group in GROUPS]
        lines += [
            f"| bits | {' | '.join(heads)} | GB/s, int8 g128 | of bandwidth | slowest int8 to the "
            "faster dense | slowest float to the faster dense |",
            "|---" * (len(heads) + 5) + "|",
        ]
        for bits in WIDTHS:
            names = {
                head: f"plyweight {head.split()[0]} {bits} {head.split()[1]}" for head in heads
            }
            read = piece["weight_bytes"][names["int8 g128"]] / seconds[names["int8 g128"]]
            cells = [milliseconds(piece, m, names[head]) for head in heads]
            cells += [f"{read / 1e9:.1f}", f"{read / piece['bandwidth'][str(bits)]:.0%}"]
            for mode in MODES:
                slowest = max(seconds[names[f"{mode} g{group}"]] for group in GROUPS)
                cells.append(f"{dense / slowest:.2f} x")
            lines.append(f"| {bits} | {' | '.join(cells)} |")
        lines.append("")
    lines += ["| other | ms | GB/s | to torch float32 |", "|---" * 4 + "|"]
    for name, median in seconds.items():
        if not name.startswith("plyweight"):
            read = piece["weight_bytes"][name] / median / 1e9
            speed = seconds["torch float32"] / median
            time = milliseconds(piece, m, name)
            lines.append(f"| {name} | {time} | {read:.1f} | {speed:.2f} x |")
    return lines
