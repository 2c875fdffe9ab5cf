"""The agreement benchmark, on a few pictures: what it compares, and where it writes that."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from cifar10_data import Cifar10
from cifar10_nets import NETS
from examples.pictures import write_pictures

import plyweight

PATH = Path(__file__).parents[2] / "benchmarks" / "agreement.py"


@pytest.fixture(scope="module")
def agreement():
    spec = importlib.util.spec_from_file_location("agreement", PATH)
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)  # which the benchmark adds the example to
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


@pytest.mark.slow
def test_it_says_how_often_the_answers_are_the_same(agreement, tmp_path, capsys):
    data = write_pictures(tmp_path / "data", num_per_file=160)
    images, _ = Cifar10.load(data).batch(0, 128, seed=0)
    model = plyweight.prepare(NETS["resnet8"](), (2, 8)).eval()
    plyweight.calibrate(model, [images])
    plyweight.pack(model, tmp_path / "net.layered.safetensors")
    arguments = ["--data", data, "--out", tmp_path / "results"]
    arguments += [tmp_path / "net.layered.safetensors", "--grids", "packed", "float"]
    agreement.main(list(map(str, arguments)))
    found = json.loads((tmp_path / "results" / "agreement-resnet8.json").read_text())
    assert [row["bit_width"] for row in found["rows"]] == [8, 2]
    for row in found["rows"]:
        assert row["agreement"] >= 98
        assert abs(row["engine"] - row["torch"]) <= 2
        assert list(row["agreement_before"]) == ["packed", "float"]
    assert found["conditions"]["num_images"] == 160
    assert capsys.readouterr().out.strip() == (
        (tmp_path / "results" / "agreement-resnet8.md").read_text().strip()
    )


def test_data_that_is_needed_is_asked_for(agreement, tmp_path):
    with pytest.raises(SystemExit, match="--data is missing"):
        agreement.main([str(tmp_path / "net.layered.safetensors")])
