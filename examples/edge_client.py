"""A device without torch: it answers as soon as the base layer is here, and better a moment later.

    pip install "plyweight[engine]"
    python examples/edge_client.py https://host/net.layered.safetensors x.npy --id HEX

x.npy is a batch that numpy.save wrote. ``--id`` is the artifact's id, from whoever packed it;
without one the first artifact that comes from the address is trusted, and no other after it.
"""

import argparse
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

import plyweight


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("address", help="URL or file of an artifact that has a graph")
    parser.add_argument("input", help="file of numpy.save, a batch")
    parser.add_argument("--id", help="64 hexadecimal digits")
    options = parser.parse_args(arguments)
    x = np.load(options.input, allow_pickle=False)
    started = time.perf_counter()

    # The header says what there is; no more of the file is needed for that.
    receipt = plyweight.inspect(options.address, artifact_id=options.id)
    base = receipt.layers[0].bit_width
    with (
        plyweight.open(options.address, bit_width=base, artifact_id=options.id) as engine,
        ThreadPoolExecutor(1) as background,
    ):

        def answer() -> None:
            logits = next(iter(engine.run({engine.inputs[0].name: x}).values()))
            classes = ", ".join(map(str, logits.argmax(axis=-1).tolist()))
            seconds = time.perf_counter() - started
            print(f"{seconds:6.2f} s  {engine.bit_width} bits  classes {classes}", flush=True)

        answer()
        upgrade = background.submit(engine.upgrade)  # to the widest; only the layers still missing
        num_answers = 0
        while not upgrade.done():  # requests go on meanwhile, each at one width from start to end
            engine.run({engine.inputs[0].name: x})
            num_answers += 1
        try:
            upgrade.result()
        except plyweight.PlyweightError as error:
            print(f"stays at {engine.bit_width} bits, as good as before: {error}")
        print(f"{num_answers} answers during the upgrade")
        answer()


if __name__ == "__main__":
    main()
