"""What the engine takes of memory, and gives back."""

import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from engine.handmade import float32
from engine.weight_only import WeightOnly
from onnx import TensorProto, helper

from plyweight.artifact import (
    ArtifactReader,
    Graph,
    LayerContent,
    LayeredWeight,
    Model,
    ModelInfo,
    Module,
    Port,
    Quantizer,
    TensorData,
    write_artifact,
)
from plyweight.engine.values import SlotValues

BIT_WIDTHS = (2, 4, 8)
DEPTH, WIDTH = 12, 1024  # 12 MiB of levels
MIB = 2**20


def slot(name, data_type, dims=()):
    tensor = TensorProto(name=name, data_type=data_type, dims=dims)
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="slots")
    return tensor


def chain_graph():
    """Products of square matrices, one after the other, all of one grid between them."""
    grid, nodes = ("x.step", "x.zero_point"), []
    slots = [slot("x.step", TensorProto.FLOAT), slot("x.zero_point", TensorProto.UINT8)]
    x = "input"
    for i in range(DEPTH):
        m = f"m{i}"
        slots += [
            slot(f"{m}.levels", TensorProto.INT8, (WIDTH, WIDTH)),
            slot(f"{m}.scale", TensorProto.FLOAT, (WIDTH,)),
            slot(f"{m}.zero_point", TensorProto.INT8, (WIDTH,)),
        ]
        weight = [f"{m}.levels", f"{m}.scale", f"{m}.zero_point"]
        nodes += [
            helper.make_node("QuantizeLinear", [x, *grid], [f"q{i}"]),
            helper.make_node("DequantizeLinear", [f"q{i}", *grid], [f"d{i}"]),
            helper.make_node("DequantizeLinear", weight, [f"w{i}"], axis=1),
            helper.make_node("MatMul", [f"d{i}", f"w{i}"], [f"y{i}"]),
        ]
        x = f"y{i}"
    ports = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", WIDTH])
        for name in ("input", x)
    ]
    graph = helper.make_graph(nodes, "chain", ports[:1], ports[1:], slots)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return Graph(
        models=(
            Model(
                bit_widths=BIT_WIDTHS,
                slots=tuple(tensor.name for tensor in slots),
                data=model.SerializeToString(),
            ),
        ),
        inputs=(Port("input", "float32", ("batch", WIDTH)),),
        outputs=(Port(x, "float32", ("batch", WIDTH)),),
        modules={
            f"m{i}": Module(param=f"m{i}.weight", input="x", is_transposed=True)
            for i in range(DEPTH)
        },
        quantizers={
            "x": Quantizer(
                steps=dict.fromkeys(BIT_WIDTHS, 0.05), zero_points=dict.fromkeys(BIT_WIDTHS, 128)
            )
        },
        tensors={},
    )


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("memory") / "chain"
    rng = np.random.default_rng(0)
    names = [f"m{i}.weight" for i in range(DEPTH)]
    planes = {n: rng.integers(0, 256, (8, WIDTH * WIDTH // 8), dtype=np.uint8) for n in names}
    data = chain_graph().to_bytes()
    layers, previous = [], 0
    for bit_width in BIT_WIDTHS:
        tensors = [] if previous else [TensorData("__graph__", "U8", (len(data),), data)]
        for name in names:
            rows = planes[name][previous:bit_width]
            tensors.append(TensorData(f"{name}.q", "U8", rows.shape, rows.tobytes()))
            if not previous:
                tensors.append(float32(f"{name}.scale", np.full(WIDTH, 1e-4)))
        layers.append(LayerContent(bit_width, tensors))
        previous = bit_width
    write_artifact(
        path,
        layers=layers,
        weights={name: LayeredWeight((WIDTH, WIDTH)) for name in names},
        activations={},
        model=ModelInfo(name="chain", revision=0, created_by="plyweight tests"),
    )
    return path


def test_the_values_take_no_more_than_the_levels_and_a_little(path):
    reader = ArtifactReader(path)
    layers = [reader.read_layer(i) for i in range(3)]
    values = SlotValues(reader.header, chain_graph(), layers, 8)
    tracemalloc.start()
    held = values.all()
    now, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    levels = DEPTH * WIDTH * WIDTH
    assert sum(value.nbytes for value in held.values()) < levels + MIB
    assert now < levels + MIB
    assert peak < levels + 3 * WIDTH * WIDTH  # one matrix more while it is transposed


def in_a_process(code, path):
    """The numbers that ``code`` prints, where ``resident()`` says how many bytes there are."""
    start = """if True:
        import sys, numpy, plyweight
        def resident():
            with open("/proc/self/statm") as file:
                return int(file.read().split()[1]) * 4096
    """
    done = subprocess.run(
        [sys.executable, "-c", start + code, str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return map(int, done.stdout.split())


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux says how much")
def test_a_downgrade_and_closing_give_memory_back_to_the_system(path):
    code = f"""
        x = {{"input": numpy.zeros((1, {WIDTH}), "float32")}}
        plyweight.open(sys.argv[1], bit_width=2, threads=1).close()  # what is needed once
        before = resident()
        engine = plyweight.open(sys.argv[1], threads=1)
        for bit_width in (8, 4, 2):
            engine.set_bit_width(bit_width)
            engine.run(x)
        all_widths = resident()
        report = engine.report()
        engine.downgrade(2)
        one_width = resident()
        engine.run(x)
        told = engine.report().resident_bytes
        engine.close()
        closed = resident()
        print(all_widths - before, report.resident_bytes, one_width - before, told, closed - before)
    """
    all_widths, told_all, one_width, told_one, closed = in_a_process(code, path)
    levels = DEPTH * WIDTH * WIDTH
    assert all_widths > 6 * levels  # three sessions, each with its values and the runtime's form
    assert one_width < all_widths / 2
    assert closed < levels
    # What the report says is what the system says, give or take a few MiB.
    assert abs(told_all - all_widths) < levels
    assert abs(told_one - one_width) < levels


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux says how much")
def test_a_session_of_nibbles_takes_half_a_byte_for_a_weight_or_one(tmp_path):
    levels, path = 4096 * 8192, tmp_path / "net"
    WeightOnly(4096, 8192, bit_widths=(2, 8)).write(path)
    code = """
        x = {"x": numpy.zeros((1, 4096), "float32")}
        plyweight.open(sys.argv[1], bit_width=2, threads=1).close()  # what is needed once
        for bit_width in (2, 8):
            before = resident()
            with plyweight.open(sys.argv[1], bit_width=bit_width, threads=1) as engine:
                engine.run(x)
                print(resident() - before - engine.report().held_bytes)
    """
    narrow, wide = in_a_process(code, path)
    scales = levels // 256 * 4
    assert abs(narrow - levels / 2 - scales) < levels / 8
    assert abs(wide - levels - 2 * scales) < levels / 8
