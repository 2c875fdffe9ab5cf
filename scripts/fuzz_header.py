"""Fuzz what reads untrusted bytes first: the parser of the header, and that of the sidecar.

    pip install atheris
    python scripts/fuzz_header.py -max_total_time=600         further options are libFuzzer's

Seeds come from tests/golden/corpus; what is found is written to the current folder. An input is
the text of a header or a sidecar; half of the mutations change bytes, the other half values of the
JSON, mostly of a seed's. Whatever the input is, a parser must refuse it with an ArtifactError, or

    parse(emit(parse(raw))) == parse(raw),    and stock safetensors opens a file with that header.
"""

import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
CORPUS = ROOT / "tests" / "golden" / "corpus"
MOST_DATA_BYTES = 2**20  # of a file that is made for stock safetensors
INTERESTING = [
    0,
    1,
    7,
    8,
    2**31,
    2**40,
    2**44,
    2**53,
    2**53 + 1,
    2**63,
    -1,
    1.0,
    True,
    None,
    "",
    [],
]
KEYS = ["L0/x", "__pad__.3", "__metadata__", "shape", "bits", "2", "layered.x-a", "a" * 513]


def check(text: bytes) -> tuple[bool, bool]:
    """Judge one input; whether it is a header, and whether it is a sidecar."""
    return _check_header(text), _check_sidecar(text)


def _check_header(text: bytes) -> bool:
    from plyweight.artifact import Header
    from plyweight.errors import ArtifactError

    padded = text.ljust(-(-(len(text) + 8) // 8) * 8 - 8, b" ")
    raw = len(padded).to_bytes(8, "little") + padded
    try:
        header = Header.parse(raw)
    except ArtifactError:
        return False
    again = Header.parse(header.emit())
    for name in ("weights", "activations", "tensors", "model", "io", "evaluation", "extensions"):
        assert getattr(again, name) == getattr(header, name), name
    assert again.emit() == header.emit()
    for index in range(len(header.layers)):
        header.tensors_of(index)
    data_bytes = header.file_bytes - header.data_start
    if data_bytes <= MOST_DATA_BYTES:
        import safetensors

        names = {name for name, _ in safetensors.deserialize(raw + bytes(data_bytes))}
        assert names == {entry.name for entry in header.tensors}
    return True


def _check_sidecar(text: bytes) -> bool:
    from plyweight.artifact import Sidecar
    from plyweight.errors import ArtifactError

    try:
        sidecar = Sidecar.parse(text)
    except ArtifactError:
        return False
    assert Sidecar.parse(sidecar.emit()) == sidecar
    assert all("/" not in part.file and part.file[0] != "." for part in sidecar.parts)
    return True


def mutate(value: Any, rng: random.Random) -> Any:
    """``value`` with one thing changed, at any depth, JSON inside strings included."""
    if isinstance(value, str) and value[:1] in ("{", "[") and rng.random() < 0.9:
        try:
            return json.dumps(mutate(json.loads(value), rng))
        except ValueError:
            return value[: rng.randrange(len(value))]
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        action = rng.random()
        if action < 0.8:
            return {k: mutate(v, rng) if k == key else v for k, v in value.items()}
        if action < 0.9:
            return {k: v for k, v in value.items() if k != key}
        name = rng.choice([*KEYS, *value])
        return {name if k == key else k: v for k, v in value.items()}
    if isinstance(value, list) and value and rng.random() < 0.9:
        place = rng.randrange(len(value))
        if rng.random() < 0.2:
            return [*value[:place], rng.choice(value), *value[place:]]
        return [mutate(v, rng) if i == place else v for i, v in enumerate(value)]
    if type(value) is int and rng.random() < 0.5:
        return value + rng.choice([-8, -1, 1, 8])
    return rng.choice(INTERESTING)


def main() -> None:
    """Fuzz until libFuzzer is told to stop or something is found."""
    import atheris

    with atheris.instrument_imports(include=["plyweight"]):
        import plyweight.artifact  # noqa: F401  instrumented while it is imported

    seeds = [path.read_bytes() for path in sorted(CORPUS.iterdir())]

    def mutator(data: bytes, max_size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < 0.5:
            return bytes(atheris.Mutate(data, max_size))
        try:
            # Most of what libFuzzer keeps is refused early; what is nearly right reaches deeper.
            value = json.loads(data if rng.random() < 0.3 else rng.choice(seeds))
            for _ in range(rng.randint(1, 3)):
                value = mutate(value, rng)
            return json.dumps(value).encode()[:max_size]
        except (ValueError, RecursionError):
            return bytes(atheris.Mutate(data, max_size))

    counts = {"executions": 0, "headers": 0, "sidecars": 0}

    def one_input(data: bytes) -> None:
        is_header, is_sidecar = check(data)
        counts["executions"] += 1
        counts["headers"] += is_header
        counts["sidecars"] += is_sidecar
        if counts["executions"] % 100_000 == 0:
            sys.stderr.write(f"{counts}\n")

    options = [sys.argv[0], "-max_len=16384", *sys.argv[1:]]
    # What reaches new code is kept in the first folder, and the seeds stay as they are.
    options += [tempfile.mkdtemp(prefix="fuzz-header-"), str(CORPUS)]
    atheris.Setup(options, one_input, custom_mutator=mutator)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
