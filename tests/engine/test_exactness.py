"""Sums of products of bytes are exact, on processors whose own instructions saturate too."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest
from onnx import TensorProto, helper

from plyweight.engine.exactness import COLUMNS, INNER, PROBE, ROWS, does_saturate

QEMU = os.environ.get("PLYWEIGHT_QEMU") or shutil.which("qemu-x86_64-static") or "qemu-x86_64"


def test_the_probe_is_a_product_of_two_matrices():
    weight = TensorProto(name="w", data_type=TensorProto.INT8, dims=[INNER, COLUMNS])
    weight.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "slots"), ("offset", "0"), ("length", str(INNER * COLUMNS))):
        weight.external_data.add(key=key, value=value)
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w"], ["sums"])],
        "p",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [ROWS, INNER])],
        [helper.make_tensor_value_info("sums", TensorProto.INT32, [ROWS, COLUMNS])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 10)], ir_version=4)
    assert model.SerializeToString(deterministic=True) == PROBE


def test_the_answer_is_that_of_the_processor():
    flags = _flags()
    if flags is None:
        pytest.skip("this system does not say what its processor can")
    assert does_saturate(onnxruntime) == (not flags & {"avx512_vnni", "avx_vnni"})


@pytest.mark.slow
def test_a_processor_that_saturates_gives_what_the_reference_gives(tmp_path):
    if shutil.which(QEMU) is None:
        pytest.skip("qemu-user is not installed")
    code = (
        "import sys, numpy, onnxruntime, plyweight\n"
        "from engine.handmade import BIT_WIDTHS, images, residual_graph, write\n"
        "from plyweight.engine.exactness import does_saturate\n"
        "write(sys.argv[1], residual_graph())\n"
        "with plyweight.open(sys.argv[1], threads=1) as engine:\n"
        "    for b in BIT_WIDTHS:\n"
        "        engine.set_bit_width(b)\n"
        "        numpy.save(f'{sys.argv[1]}.{b}.npy', engine.run({'input': images()})['logits'])\n"
        "print(does_saturate(onnxruntime))\n"
    )
    found = {}
    for name, prefix in (("here", []), ("emulated", [QEMU, "-cpu", "Haswell"])):
        path = tmp_path / name
        command = [*prefix, sys.executable, "-c", code, str(path)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr
        saturates = done.stdout.strip() == "True"
        found[name] = [f.read_bytes() for f in sorted(tmp_path.glob(f"{name}.*.npy"))]
    assert saturates
    assert found["emulated"] == found["here"]


def _flags():
    """What the processor can, on Linux on x86."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((set(line.split()) for line in lines if line.startswith("flags")), None)
