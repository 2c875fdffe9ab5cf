"""Opening an artifact as an engine: near or far, with limits and options, or a reason why not."""

import dataclasses
import subprocess
import sys

import pytest
from delivery.servers import hostile
from engine.handmade import BIT_WIDTHS, answers, residual_graph, write

import plyweight
from plyweight.artifact import ArtifactReader, Model
from plyweight.errors import (
    ArtifactError,
    BitWidthError,
    EngineError,
    GraphError,
    LayeringError,
    TrustError,
)

PATIENCE_S = 60  # for what takes milliseconds, on however busy a machine


def test_a_cut_file_has_what_it_has(path, expected, tmp_path):
    header = ArtifactReader(path).header
    cut = tmp_path / "cut"
    cut.write_bytes(path.read_bytes()[: header.prefix_bytes(4)])
    with plyweight.open(cut, threads=1) as engine:
        assert (engine.bit_width, engine.stored_bit_widths) == (4, BIT_WIDTHS)
        assert answers(engine, expected) == 4
        with pytest.raises(BitWidthError, match="fetch bytes"):
            engine.upgrade(8)


def test_an_artifact_without_a_graph_says_how_to_add_one(tmp_path):
    write(tmp_path / "net", None)
    with pytest.raises(GraphError, match=r"pack\(model, file, example_inputs=\.\.\.\)"):
        plyweight.open(tmp_path / "net")


def test_a_graph_that_breaks_a_rule_is_refused_with_the_name_of_its_file(tmp_path):
    write(tmp_path / "net", b"no zlib")
    with pytest.raises(ArtifactError, match=r"net: the graph is no zlib stream"):
        plyweight.open(tmp_path / "net")


def test_a_model_that_the_runtime_refuses_is_an_error_in_one_sentence(tmp_path):
    graph = residual_graph()
    broken = Model(bit_widths=BIT_WIDTHS, slots=(), data=b"\x08\x09")
    graph = dataclasses.replace(graph, models=(broken,))
    write(tmp_path / "net", graph)
    with pytest.raises(GraphError, match="refuses the graph for 2, 4, 8 bits"):
        plyweight.open(tmp_path / "net")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "tvm"}, "backend is 'tvm'; give one of onnxruntime, openvino"),
        ({"threads": 0}, "threads is 0; give an integer of 1 or more, or None"),
        ({"warm_bytes": -1}, "warm_bytes is -1; give an integer of 0 or more"),
        (
            {"providers": ["NoExecutionProvider"]},
            "the providers NoExecutionProvider were asked for, but this ONNX Runtime has .*CPU",
        ),
        ({"providers": []}, "this ONNX Runtime has"),
    ],
)
def test_an_option_that_is_wrong_says_what_there_is(path, options, message):
    with pytest.raises(EngineError, match=message):
        plyweight.open(path, **options)


def test_a_provider_may_come_with_its_own_options(path, expected):
    provider = ("CPUExecutionProvider", {"arena_extend_strategy": "kSameAsRequested"})
    with plyweight.open(path, providers=[provider], threads=1) as engine:
        assert answers(engine, expected) == 8


def test_options_of_fetching_are_for_urls(path):
    with pytest.raises(LayeringError, match=r"parallel was given, but .* is no URL"):
        plyweight.open(path, parallel=2)
    with pytest.raises(TrustError, match="was asked for"):
        plyweight.open(path, artifact_id="0" * 64)


def test_limits_choose_the_width_and_an_upgrade_by_name_goes_beyond(path):
    header = ArtifactReader(path).header
    with plyweight.open(path, max_bytes=header.prefix_bytes(4), threads=1) as engine:
        assert engine.bit_width == 4
        engine.upgrade()
        assert engine.bit_width == 4
        engine.upgrade(8)
        assert engine.bit_width == 8


def test_a_url_is_fetched_as_far_as_needed_and_upgraded_from_there(path, expected, tmp_path):
    header = ArtifactReader(path).header
    with hostile(path.read_bytes()) as server:
        options = {"cache": tmp_path / "cache", "artifact_id": header.artifact_id}
        with plyweight.open(server.url, bit_width=2, threads=1, **options) as engine:
            assert (engine.bit_widths, answers(engine, expected)) == ((2,), 2)
            engine.upgrade(4)
            assert answers(engine, expected) == 4
            engine.downgrade(2)
            engine.upgrade()
            assert (engine.bit_width, answers(engine, expected)) == (8, 8)


def test_none_of_it_imports_torch_or_onnx(path):
    code = (
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name in ('torch', 'onnx', 'onnxscript'):\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "import numpy, plyweight\n"
        "with plyweight.open(sys.argv[1], bit_width=2, threads=1) as engine:\n"
        "    x = numpy.zeros((1, 3, 9, 9), 'float32')\n"
        "    engine.upgrade(8); engine.run({'input': x}); engine.downgrade(2)\n"
        "    print(engine.run({'input': x})['logits'].shape)\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "(1, 10)", done.stderr


def test_without_onnxruntime_it_says_how_to_install_it(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r'pip install "plyweight\[engine\]"'):
        plyweight.open(path)
