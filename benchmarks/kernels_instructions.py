"""What do the Triton kernels ask of a GPU, in instructions per weight?

Compiles them for GPUs that need not be here, and counts the instructions of the machine code's
main loop, of one warp, over the weights that it multiplies. With the GPU's rate of instructions
that is a limit beside the one of bytes over bandwidth: on an H200 (132 multiprocessors of 4
instructions for 32 lanes a clock, 1.75 GHz, 4.8 TB/s) a weight may take ``0.77 * bits``
instructions before bandwidth is not what a product waits for.

    python benchmarks/kernels_instructions.py [--json] [--rows 8 16 64]
"""

import argparse
import json
import re
from collections import Counter
from itertools import product

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from plyweight.kernels import triton_code, triton_launch

ARCHITECTURES = {80: "Ampere", 90: "Hopper"}
H200_PER_BIT = 132 * 4 * 32 * 1.75e9 / (4.8e12 * 8)  # instructions of a lane in the time of a bit


def compiled(arch, *, bits, dtype, rows, group_size=None):
    """The product of up to ``rows`` rows, as it is launched on a weight of 4096 x 4096."""
    is_few = rows <= triton_launch.FEW_ROWS
    function = triton_code.product_of_few if is_few else triton_code.product_of_many
    warps = 4
    constants = {
        "BITS": bits,
        "GROUP": group_size or triton_code.INPUTS.value,
        "ROWS": rows,
        "WARPS": warps,
        "WIDE": triton_launch.IS_WIDE,
        "BFLOAT": dtype != "fp16",
        "EMULATED": False,
    }
    if not is_few:
        constants["TILE_WIDE"] = triton_launch.IS_WIDE and arch != 90
    types = {"x": f"*{dtype}", "y": f"*{dtype}", "scale": "*fp32", "unit": "fp32"}
    types |= {f"p{index}": "*i32" for index in range(8)} | dict.fromkeys(constants, "constexpr")
    names = function.arg_names
    signature = {name: types.get(name, "i32") for name in names}
    by_16 = [
        index
        for index, name in enumerate(names)
        if signature[name].startswith("*") or name in ("num_outputs", "num_inputs", "blocks")
    ]
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs=constants,
        attrs={(index,): [["tt.divisibility", 16]] for index in by_16},
    )
    options = {"num_warps": warps, "num_stages": 4, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def main_loop(sass):
    """The instructions between the longest jump back and its target."""
    instructions, labels, loops = [], {}, []
    for line in sass.splitlines():
        if label := re.match(r"(LBB\d+):", line.strip()):
            labels[label[1]] = len(instructions)
        elif "\t" in line:
            text = re.sub(r"^@!?U?P\w+ ", "", line.split("\t", 1)[1].strip())
            instructions.append(text)
            jump = re.match(r"BRA\S*.*?(LBB\d+)", text)
            if jump and jump[1] in labels:
                loops.append(instructions[labels[jump[1]] :])
    return max(loops, key=len)


def measured(arch, **options):
    kernel = compiled(arch, **options)
    loop = main_loop(kernel.asm["sass"])
    # A warp has 16 outputs of a block of 256 inputs in a turn, a lane a 32nd of them.
    weights = triton_code.OUTPUTS.value * triton_code.INPUTS.value / 32
    names = Counter(re.split(r"[.\s;]", text)[0] for text in loop)
    return {
        "arch": arch,
        **options,
        "per_weight": len(loop) / weights,
        "shared_bytes": kernel.metadata.shared,
        "exchanges": names["SHFL"] + names["STS"] + names["STSM"],
        "spills": names["STL"] + names["LDL"],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rows", type=int, nargs="+", default=(8, 16, 64))
    options = parser.parse_args()
    cases = [
        {"bits": bits, "dtype": dtype, "rows": rows}
        for rows, dtype, bits in product(options.rows, ("fp16", "bf16"), range(1, 9))
    ]
    cases += [
        {"bits": bits, "dtype": "fp16", "rows": 8, "group_size": size}
        for size, bits in product((32, 128), (2, 4, 8))
    ]
    results = [measured(arch, **case) for arch in ARCHITECTURES for case in cases]
    if options.json:
        print(json.dumps({"triton": triton.__version__, "results": results}))
        return
    print(f"Instructions per weight, Triton {triton.__version__}\n")
    print("| GPU | rows | activations | group | " + " | ".join(map(str, range(1, 9))) + " |")
    print("|---|---|---|---|" + "---|" * 8)
    lines = {}
    for result in results:
        key = tuple(result.get(name) for name in ("arch", "rows", "dtype", "group_size"))
        lines.setdefault(key, {})[result["bits"]] = f"{result['per_weight']:.2f}"
    for (arch, *key), cells in lines.items():
        row = [f"{ARCHITECTURES[arch]} (sm_{arch})", *key, *(cells.get(b) for b in range(1, 9))]
        print("| " + " | ".join("" if cell is None else str(cell) for cell in row) + " |")
    budget = " | ".join(f"{H200_PER_BIT * bits:.2f}" for bits in range(1, 9))
    print(f"| H200, in the time of the bytes | | | | {budget} |")


if __name__ == "__main__":
    main()
