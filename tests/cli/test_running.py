"""run and bench: an artifact answers from the command line, without torch."""

import sys

import numpy as np
import pytest
from cli.calls import assert_called_wrongly, assert_one_sentence, run, run_json
from delivery.servers import hostile
from engine.handmade import BIT_WIDTHS, IO, SIDE, images, residual_graph, write

import plyweight
from plyweight.cli import running

PREPARED = IO | {
    "preprocessing": {
        "size": [SIDE, SIDE],
        "mean": ["0.5", "0.4", "0.3"],
        "std": ["0.25", "0.2", "0.5"],
        "layout": "NCHW",
    }
}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    path = tmp_path_factory.mktemp("running") / "net.layered.safetensors"
    write(path, residual_graph(), io=PREPARED)
    return path


@pytest.fixture
def array(tmp_path):
    np.save(tmp_path / "x.npy", images(2))
    return tmp_path / "x.npy"


def logits(artifact, x, bit_width):
    with plyweight.open(artifact, bit_width=bit_width) as engine:
        return engine.run({"input": x})["logits"]


@pytest.mark.parametrize("bit_width", BIT_WIDTHS)
def test_run_gives_the_best_classes_of_the_engine_with_their_labels(
    capsys, artifact, array, bit_width
):
    told = run_json(capsys, "run", artifact, "--input", array, "-b", bit_width, "--top", 3)
    assert told["bit_width"] == bit_width
    output = told["outputs"]["logits"]
    assert (output["dtype"], output["shape"]) == ("float32", [2, 10])
    for row, best in zip(logits(artifact, images(2), bit_width), output["top"], strict=True):
        order = np.argsort(-row, kind="stable")[:3]
        assert [item["index"] for item in best] == order.tolist()
        assert [item["label"] for item in best] == [f"class {i}" for i in order]
        assert [np.float32(item["logit"]) for item in best] == row[order].tolist()
        assert 0 < best[2]["share"] <= best[1]["share"] <= best[0]["share"] < 1


def test_run_prints_a_table(capsys, artifact, array):
    code, out, err = run(capsys, "run", artifact, "--input", f"input={array}", "-b", "4")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("logits  float32 2 x 10  4 bits  ")
    assert lines[1].split() == ["label", "logit", "share"]
    assert len(lines) == 1 + 2 * 6


def test_an_array_without_a_batch_is_a_batch_of_one(capsys, artifact, tmp_path):
    np.save(tmp_path / "one.npy", images(1)[0])
    told = run_json(capsys, "run", artifact, "--input", tmp_path / "one.npy")
    assert told["outputs"]["logits"]["shape"] == [1, 10]


def test_a_picture_is_fitted_and_normalized_as_the_artifact_says(capsys, artifact, tmp_path):
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    image.fromarray(pixels).save(tmp_path / "x.png")
    told = run_json(capsys, "run", artifact, "--input", tmp_path / "x.png", "--top", 10)
    mean, std = np.float32([0.5, 0.4, 0.3]), np.float32([0.25, 0.2, 0.5])
    x = ((pixels.astype(np.float32) / 255 - mean) / std).transpose(2, 0, 1)[None]
    (expected,) = logits(artifact, np.ascontiguousarray(x), 8)
    (best,) = told["outputs"]["logits"]["top"]
    assert {i["index"]: np.float32(i["logit"]) for i in best} == dict(enumerate(expected))
    # A wider picture is cut to its middle, a grey one gets three equal channels.
    wide = np.pad(pixels, ((0, 0), (SIDE, SIDE), (0, 0)))
    image.fromarray(wide).save(tmp_path / "wide.png")
    assert _best(capsys, artifact, tmp_path / "wide.png") == best[:5]
    image.fromarray(pixels[..., 0]).save(tmp_path / "grey.png")
    assert len(_best(capsys, artifact, tmp_path / "grey.png")) == 5


def _best(capsys, artifact, path):
    return run_json(capsys, "run", artifact, "--input", path)["outputs"]["logits"]["top"][0]


def test_what_cannot_be_read_is_said_in_a_sentence(capsys, artifact, tmp_path, monkeypatch):
    def answer(path, *more):
        return run(capsys, "run", artifact, "--input", path, *more)

    assert_one_sentence(answer(tmp_path / "none.npy"), "none.npy cannot be read", "check the path")
    (tmp_path / "bad.npy").write_bytes(b"no array")
    assert_one_sentence(answer(tmp_path / "bad.npy"), "bad.npy is no array", "numpy.save")
    np.save(tmp_path / "object.npy", np.array([{}]), allow_pickle=True)
    assert_one_sentence(answer(tmp_path / "object.npy"), "object.npy is no array")
    np.save(tmp_path / "wide.npy", np.zeros((1, 3, 9, 8), np.float32))
    assert_one_sentence(answer(tmp_path / "wide.npy"), "input: float32 (batch, 3, 9, 9)")
    assert_one_sentence(answer("x=a.npy"), "'x' is no input; the model expects input")
    (tmp_path / "text.png").write_text("no picture")
    assert_one_sentence(answer(tmp_path / "text.png"), "is no picture that pillow knows")
    assert_one_sentence(answer(tmp_path / "none.png"), "none.png cannot be read")
    assert_one_sentence(answer(tmp_path / "x.npy", "-b", "3"), "3 bits were asked for")
    assert_one_sentence(answer(tmp_path / "x.npy", "--provider", "No"), "CPUExecutionProvider")
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert_one_sentence(answer(tmp_path / "text.png"), "needs pillow", "pip install pillow")


def test_wrong_calls_end_with_2(capsys, artifact, array):
    assert_called_wrongly(run(capsys, "run", artifact))
    assert_called_wrongly(run(capsys, "run", artifact, "--input", array, "-b", "9"))
    assert_called_wrongly(run(capsys, "bench", artifact, "--runs", "0"))


@pytest.mark.parametrize(
    "preprocessing",
    [{}, {"size": [9], "mean": [], "std": [], "layout": "NCHW"}, "none"]
    + [PREPARED["preprocessing"] | change for change in ({"std": ["0", "1", "1"]}, {"layout": "X"})]
    + [PREPARED["preprocessing"] | {"size": [10**9, 1]}],
)
def test_preprocessing_that_makes_no_sense_is_refused(capsys, tmp_path, preprocessing):
    write(tmp_path / "net", residual_graph(), io=IO | {"preprocessing": preprocessing})
    result = run(capsys, "run", tmp_path / "net", "--input", tmp_path / "x.png")
    assert_one_sentence(result, "what the artifact says of preparing pictures is not understood")


def test_labels_of_a_stranger_do_not_control_the_terminal(capsys, tmp_path, array):
    write(tmp_path / "net", residual_graph(), io={"labels": ["\x1b[2J"] * 10})
    code, out, _ = run(capsys, "run", tmp_path / "net", "--input", array)
    assert code == 0
    assert "\x1b" not in out
    assert "?[2J" in out


def test_a_url_is_fetched_with_what_it_takes_to_believe_it(capsys, artifact, array, tmp_path):
    artifact_id = plyweight.inspect(artifact).artifact_id
    with hostile(artifact.read_bytes()) as server:
        told = run_json(
            capsys,
            *("run", server.url, "--input", array, "-b", 2),
            *("--cache", tmp_path / "cache", "--id", artifact_id),
        )
    assert told["bit_width"] == 2


def test_bench_measures_every_width_that_is_held(capsys, artifact):
    told = run_json(capsys, "bench", artifact, "--runs", 3, "--batch", 2, "--threads", 1)
    assert [row["bit_width"] for row in told["rows"]] == list(BIT_WIDTHS)
    for row in told["rows"]:
        assert 0 < row["min_s"] <= row["median_s"] <= row["max_s"]
        assert row["per_s"] == pytest.approx(2 / row["median_s"])
    assert told["rows"][-1]["cold_switch_s"] is None  # it was opened at that one
    assert told["rows"][0]["cold_switch_s"] > told["rows"][0]["warm_switch_s"]
    code, out, _ = run(capsys, "bench", artifact, "--runs", 2, "-b", 4)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[1:3]] == ["2", "4"]


@pytest.mark.parametrize("runs", [1, 7, 50])
def test_bench_times_as_many_requests_as_were_asked_for_at_every_width(runs, artifact, monkeypatch):
    monkeypatch.setattr(running, "SETTLING_S", 0)
    with plyweight.open(artifact, warm_bytes=running.WARM_BYTES) as engine:
        times, switches = running._in_turns(engine, {"input": images(1)}, runs)
        assert engine.bit_width == BIT_WIDTHS[-1]
    assert {b: len(found) for b, found in times.items()} == dict.fromkeys(BIT_WIDTHS, runs)
    assert {len(found) for found in switches.values()} == {min(runs, running.TURNS)}
