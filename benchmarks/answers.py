"""What the engine answers at every bit-width, without torch.

    python benchmarks/answers.py ARTIFACT INPUTS.npy ANSWERS.npz [BACKEND]

INPUTS.npy is float32 ``(n, ...)``, ANSWERS.npz has the classes, int64 ``(n,)``, by bit-width. Runs
in an environment that has numpy, a runtime and plyweight alone; benchmarks/agreement.py starts it
with the Python that it is given.
"""

import sys
from collections.abc import Sequence

import numpy as np

import plyweight

BATCH_SIZE = 250


def main(arguments: Sequence[str]) -> None:
    """Answer everything at every bit-width, and write that."""
    artifact, inputs, answers, *rest = arguments
    (backend,) = rest or ["onnxruntime"]
    data = np.load(inputs, mmap_mode="r", allow_pickle=False)
    found = {}
    with plyweight.open(artifact, threads=1, backend=backend) as engine:
        (port,), output = engine.inputs, engine.outputs[0]
        for bit_width in engine.bit_widths:
            engine.set_bit_width(bit_width)
            logits = [
                engine.run({port.name: np.ascontiguousarray(data[start : start + BATCH_SIZE])})
                for start in range(0, len(data), BATCH_SIZE)
            ]
            found[str(bit_width)] = np.concatenate([x[output.name].argmax(-1) for x in logits])
    if "torch" in sys.modules:
        sys.exit("torch was imported")
    np.savez(answers, **found)


if __name__ == "__main__":
    main(sys.argv[1:])
