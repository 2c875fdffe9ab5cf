"""The training example: from a folder of pictures to an artifact, whatever happens on the way."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import cifar10
import pytest
import torch
from cifar10_checkpoints import CheckpointError, read_checkpoint
from cifar10_data import Cifar10
from cifar10_jobs import accuracy, predictions
from cifar10_nets import NETS
from cifar10_place import Place
from cifar10_stages import Stage
from examples.pictures import write_pictures
from safetensors.torch import load_file, save_file

import plyweight

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
# 128 pictures to train on: 4 steps an epoch.
QUICK = ["--net", "resnet8", "--batch-size", "32", "--float-epochs", "1", "--epochs", "2"]
QUICK += ["--recalibration-batches", "1", "--bit-widths", "2", "4", "8", "--device", "cpu"]
# Everything that has a state of its own.
STATEFUL = ["--sampling", "sandwich", "--ema-decay", "0.9", "--damping-weight", "0.1"]
STATEFUL += ["--start", "calibrated"]
# Run as `python -c KILLED STAGE STEP ARGUMENTS...`: a SIGKILL in the middle of that step.
KILLED = """
import os, signal, sys
import cifar10, cifar10_stages
stage, step = sys.argv[1], int(sys.argv[2])
take_step = cifar10_stages.Stage._take_step
def take_step_or_die(self):
    if (self.name, self.step) == (stage, step):
        os.kill(os.getpid(), signal.SIGKILL)
    return take_step(self)
cifar10_stages.Stage._take_step = take_step_or_die
cifar10.main(sys.argv[3:])
"""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"), num_per_file=32)


@pytest.fixture(scope="module")
def unbroken(pictures, tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("unbroken")
    assert run(pictures, out, *STATEFUL) == 0
    return out


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def run(pictures, out, *options):
    return cifar10.main(["--data", str(pictures), "--out", str(out), *QUICK, *options])


def artifact_of(out):
    return (out / "resnet8.layered.safetensors").read_bytes()


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def sends(number, *, stage="once-qat", step=5):
    """A step of training in whose middle a signal comes."""
    take_step = Stage._take_step

    def take_step_and_receive(self):
        if (self.name, self.step) == (stage, step):
            os.kill(os.getpid(), number)
        return take_step(self)

    return take_step_and_receive


def test_the_results_are_those_of_the_artifact_loaded_at_every_bit_width(pictures, unbroken):
    results = json.loads((unbroken / "results.json").read_text())
    assert results["num_images"] == {"held_out": 32, "official": 32}
    assert [row["bit_width"] for row in results["widths"]] == [2, 4, 8]
    data = Cifar10.load(pictures)
    for row in results["widths"]:
        net = NETS["resnet8"](10)
        path = unbroken / "resnet8.layered.safetensors"
        loaded = plyweight.load(path, net, bit_width=row["bit_width"])
        for kind, official in (("held_out", False), ("official", True)):
            batches = data.test_batches(official=official)
            predicted = predictions(loaded, batches)
            assert accuracy(predicted, batches) == row[kind]


def test_the_network_learns_at_every_bit_width(unbroken):
    results = json.loads((unbroken / "results.json").read_text())
    for row in results["widths"]:
        assert row["held_out"] > 0.3  # 0.1 is chance


def test_the_logs_have_a_row_for_each_epoch_with_every_bit_width(unbroken):
    assert [row["step"] for row in rows_of(unbroken / "float.csv")] == ["4"]
    rows = rows_of(unbroken / "once-qat.csv")
    assert [row["step"] for row in rows] == ["4", "8"]
    names = {f"{what}/{b}" for what in ("loss", "accuracy") for b in (2, 4, 8)}
    assert names <= rows[0].keys()


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "step"), [("float", 3), ("once-qat", 5)])
def test_a_run_that_was_killed_and_resumed_packs_the_very_same_bytes(
    stage, step, pictures, unbroken, out
):
    options = ["--data", str(pictures), "--out", str(out), *QUICK, *STATEFUL, "--save-every", "2"]
    command = [sys.executable, "-c", KILLED, stage, str(step), *options]
    killed = subprocess.run(command, cwd=EXAMPLES, stderr=subprocess.PIPE, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert (out / f"{stage}.pt").exists()
    assert not (out / "results.json").exists()
    assert cifar10.main(options) == 0
    assert artifact_of(out) == artifact_of(unbroken)
    for name in ("float.csv", "once-qat.csv"):
        rows = [rows_of(folder / name) for folder in (out, unbroken)]
        for row in (row for found in rows for row in found):
            del row["seconds"]
        assert rows[0] == rows[1]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_that_is_told_to_stop_leaves_a_checkpoint_and_says_how_to_go_on(
    number, code, pictures, unbroken, out, monkeypatch, capsys
):
    weights = ["--weights", str(unbroken / "float.safetensors")]
    with monkeypatch.context() as patch:
        patch.setattr(Stage, "_take_step", sends(number))
        assert run(pictures, out, *STATEFUL, *weights) == code
    assert "stopped in once-qat after 6 of 8 steps; give the same command again" in (
        capsys.readouterr().err
    )
    assert run(pictures, out, *STATEFUL, *weights) == 0
    assert artifact_of(out) == artifact_of(unbroken)


def test_a_run_that_is_told_to_stop_in_the_last_step_of_a_stage_stops_after_it(
    pictures, out, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        patch.setattr(Stage, "_take_step", sends(signal.SIGTERM, stage="float", step=3))
        assert run(pictures, out, "--method", "float") == 143
    assert "stopped in float after 4 of 4 steps" in capsys.readouterr().err
    assert run(pictures, out, "--method", "float") == 0
    results = json.loads((out / "results.json").read_text())
    (row,) = rows_of(out / "float.csv")
    assert results["seconds"] == float(row["seconds"]) > 0


@pytest.mark.parametrize("is_first", [True, False])
def test_a_process_stops_for_the_signal_of_another_and_only_the_first_says_so(
    is_first, pictures, out, monkeypatch, capsys
):
    monkeypatch.setattr(Place, "any_process", lambda _, flag: flag)
    monkeypatch.setattr(Place, "largest", lambda _, number: max(number, signal.SIGTERM))
    monkeypatch.setattr(Place, "is_first", is_first)
    assert run(pictures, out) == 143
    assert ("stopped in float after 1 of 4 steps" in capsys.readouterr().err) == is_first


def test_a_run_that_is_done_says_so_and_changes_nothing(pictures, unbroken, capsys):
    before = {path.name: path.stat().st_mtime_ns for path in unbroken.iterdir()}
    assert run(pictures, unbroken, *STATEFUL) == 0
    assert "so this run is done" in capsys.readouterr().err
    assert {path.name: path.stat().st_mtime_ns for path in unbroken.iterdir()} == before


def test_a_run_of_other_options_is_refused_and_what_differs_is_named(pictures, unbroken, capsys):
    before = artifact_of(unbroken)
    assert run(pictures, unbroken, *STATEFUL, "--learning-rate", "0.02", "--seed", "1") == 1
    said = capsys.readouterr().err
    assert "float.safetensors is of another run: seed is 0 there and 1 here." in said
    assert run(pictures, unbroken, *STATEFUL, "--learning-rate", "0.02") == 1
    said = capsys.readouterr().err
    assert (
        "results.json is of another run: recipe.learning_rate is 0.04 there and 0.02 here" in said
    )
    assert "or another --out" in said
    assert artifact_of(unbroken) == before


def test_a_checkpoint_of_another_network_is_refused(pictures, out, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(Stage, "_take_step", sends(signal.SIGTERM, stage="float", step=1))
        assert run(pictures, out) == 143
    assert run(pictures, out, "--net", "resnet20") == 1
    said = capsys.readouterr().err
    assert "float.pt is of another run: net is resnet8 there and resnet20 here" in said


@pytest.mark.parametrize("name", ["float.pt", "float.safetensors", "results.json"])
def test_a_damaged_file_of_a_run_is_named(name, pictures, out, capsys):
    out.mkdir()
    (out / name).write_bytes(b"no such thing")
    assert run(pictures, out, "--epochs", "1") == 1
    assert f"{name} " in capsys.readouterr().err


def test_a_checkpoint_cannot_run_code(tmp_path):
    torch.save({"configuration": {}, "state": print}, tmp_path / "float.pt")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        read_checkpoint(tmp_path / "float.pt", {})


@pytest.mark.parametrize(
    ("widths", "said"),
    [
        ([], "give at least one, ascending and each only once"),
        (["2", "2"], "give at least one, ascending and each only once"),
        (["8", "2"], "give at least one, ascending and each only once"),
        (["0", "8"], "each must be an integer of 1 to 8"),
        (["2", "9"], "each must be an integer of 1 to 8"),
    ],
)
def test_bit_widths_that_make_no_artifact_are_refused_before_anything_is_read(
    widths, said, out, capsys
):
    assert run("nowhere", out, "--bit-widths", *widths) == 2
    assert said in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    "options",
    [
        ["--net", "resnet19"],
        ["--epochs", "0"],
        ["--batch-size", "-1"],
        ["--width-weights", "2:2"],
        ["--balance", "fair"],
        ["--seed", "-1"],
        ["--seed", str(2**63)],
        ["--float-learning-rate", "-0.1"],
        ["--learning-rate", "nan"],
        ["--num-random", "-1"],
        ["--clip-value", "-1"],
        ["--ema-decay", "2"],
        ["--rates", "2=-1"],
    ],
    ids=" ".join,
)
def test_options_that_cannot_be_meant_exit_with_2(options, pictures, out, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(pictures, out, *options)
    assert stopped.value.code == 2
    assert options[0] in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--width-weights", "--rates"])
def test_options_for_bit_widths_that_are_not_made_are_refused(option, out, capsys):
    assert run("nowhere", out, option, "2=2,7=3,5=1") == 2
    assert f"{option} names 7, 5, but --bit-widths are 2, 4, 8" in capsys.readouterr().err
    assert not out.exists()


def test_a_dedicated_model_takes_its_part_of_options_that_are_meant_for_all_bit_widths():
    options = ["--data", "nowhere", "--bit-widths", "4", "--rates", "2=0.5,4=0.7"]
    job = cifar10.job_of(cifar10.parser().parse_args(options))
    assert job.bit_widths == (4,)


def test_bit_widths_that_all_count_nothing_are_refused(out, capsys):
    assert run("nowhere", out, "--width-weights", "2=0,4=0,8=0") == 2
    assert "not all of them 0" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta"])
def test_a_device_that_cannot_be_computed_on_is_refused(device, pictures, out, capsys):
    assert run(pictures, out, "--device", device) == 2
    assert f"--device {device} cannot be computed on" in capsys.readouterr().err
    assert not out.exists()


def test_a_folder_without_pictures_is_named(tmp_path, out, capsys):
    assert run(tmp_path, out) == 1
    assert f"{tmp_path} has neither labels.npy with WebP sheets nor cifar-10-batches-py" in (
        capsys.readouterr().err
    )


def test_pictures_that_make_no_batch_are_refused(pictures, out, capsys):
    assert run(pictures, out, "--num-train", "31") == 1
    assert "31 images to train on make no batch of 32" in capsys.readouterr().err


def test_more_classes_than_the_network_has_are_refused(tmp_path, out, capsys):
    write_pictures(tmp_path, num_per_file=32, num_classes=11)
    assert run(tmp_path, out) == 1
    assert "has the label 10, but the networks tell 10 classes apart" in capsys.readouterr().err


def test_weights_of_another_number_of_classes_are_refused(pictures, tmp_path, out, capsys):
    save_file(NETS["resnet8"](100).state_dict(), tmp_path / "hundred.safetensors")
    assert run(pictures, out, "--weights", str(tmp_path / "hundred.safetensors")) == 1
    said = capsys.readouterr().err
    assert "linear.bias is (100,) there and (10,) here" in said


def test_weights_of_another_network_are_refused(pictures, tmp_path, out, capsys):
    torch.save(NETS["resnet20"](10).state_dict(), tmp_path / "twenty.pt")
    assert run(pictures, out, "--weights", str(tmp_path / "twenty.pt")) == 1
    said = capsys.readouterr().err
    assert "is not of this ResNet8" in said
    assert re.search(r" and \d+ more\. Give the --net", said)


@pytest.mark.parametrize("name", ["missing.pt", "damaged.pt", "damaged.safetensors"])
def test_weights_that_cannot_be_read_are_named(name, pictures, tmp_path, out, capsys):
    (tmp_path / "damaged.pt").write_bytes(b"no")
    (tmp_path / "damaged.safetensors").write_bytes(b"no")
    assert run(pictures, out, "--weights", str(tmp_path / name)) == 1
    assert f"{name} " in capsys.readouterr().err


def test_float_weights_are_kept_and_serve_a_run_of_other_bit_widths(pictures, unbroken, out):
    weights = unbroken / "float.safetensors"
    net = NETS["resnet8"](10)
    net.load_state_dict(load_file(weights))
    assert run(pictures, out, "--weights", str(weights), "--bit-widths", "8", "--epochs", "1") == 0
    assert not (out / "float.csv").exists()
    results = json.loads((out / "results.json").read_text())
    assert [row["bit_width"] for row in results["widths"]] == [8]


def test_other_float_weights_in_the_same_folder_are_another_run(pictures, tmp_path, out, capsys):
    options = {}
    for name in ("first", "second"):
        path = tmp_path / f"{name}.safetensors"
        save_file(NETS["resnet8"](10).state_dict(), path)
        options[name] = ["--method", "float", "--weights", str(path)]
    assert run(pictures, out, *options["first"]) == 0
    assert run(pictures, out, *options["second"]) == 1
    assert "results.json is of another run: float_weights is" in capsys.readouterr().err
    assert run(pictures, out, *options["first"]) == 0


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(
    pictures, unbroken, out, monkeypatch, capsys
):
    take_step = Stage._take_step

    def take_step_after_an_accident(self):
        if self.step == 5:
            with torch.no_grad():
                self.net.layer2.bn1.weight.fill_(float("nan"))
        return take_step(self)

    options = [*STATEFUL, "--weights", str(unbroken / "float.safetensors")]
    with monkeypatch.context() as patch:
        patch.setattr(Stage, "_take_step", take_step_after_an_accident)
        assert run(pictures, out, *options) == 1
    said = capsys.readouterr().err
    assert "the loss at 8 bits is nan in step 5." in said
    assert "'layer2.bn1'" in said
    assert run(pictures, out, *options) == 0
    assert artifact_of(out) == artifact_of(unbroken)


def test_a_float_loss_that_is_not_finite_stops_the_run_before_its_step(pictures, out, capsys):
    assert run(pictures, out, "--float-learning-rate", "1e30", "--float-epochs", "2") == 1
    assert "the loss of the float network is nan in step" in capsys.readouterr().err
    assert not (out / "float.safetensors").exists()


def test_a_parameter_that_is_not_finite_is_never_saved(pictures, out, monkeypatch, capsys):
    take_step = Stage._take_step

    def take_step_and_have_an_accident(self):
        losses = take_step(self)
        if self.step == 4:
            with torch.no_grad():
                self.net.conv1.weight[0] = float("inf")
        return losses

    options = ["--method", "float", "--save-every", "3"]
    with monkeypatch.context() as patch:
        patch.setattr(Stage, "_take_step", take_step_and_have_an_accident)
        assert run(pictures, out, *options) == 1
    assert "conv1.weight has values that are not finite after 4 steps of float" in (
        capsys.readouterr().err
    )
    assert not (out / "float.safetensors").exists()
    checkpoint = torch.load(out / "float.pt", weights_only=True)
    assert checkpoint["state"]["step"] == 3
    assert run(pictures, out, *options) == 0


def test_a_missing_solver_is_missed_at_once(pictures, out, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torchjd", None)
    assert run(pictures, out, "--balance", "mgda") == 2
    assert "this balance needs TorchJD" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.slow
def test_events_for_tensorboard_have_the_figures_of_the_csv_file(pictures, unbroken, out):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    weights = str(unbroken / "float.safetensors")
    assert run(pictures, out, "--weights", weights, "--tensorboard") == 0
    events = EventAccumulator(str(out / "tensorboard" / "once-qat"))
    events.Reload()
    rows = rows_of(out / "once-qat.csv")
    for name in ("loss/2", "accuracy/8", "learning_rate"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [
            (int(row["step"]), pytest.approx(float(row[name]), rel=1e-5)) for row in rows
        ]


def test_a_missing_tensorboard_is_missed_at_once(pictures, out, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert run(pictures, out, "--tensorboard") == 2
    assert "pip install tensorboard" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.slow
def test_two_processes_make_one_artifact_and_one_of_them_speaks(pictures, out):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(EXAMPLES / "cifar10.py"), *QUICK]
    command += ["--data", str(pictures), "--out", str(out), "--balance", "mgda"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("held-out") == 1
    assert done.stderr.count("epoch   2 of 2") == 1
    rows = json.loads((out / "results.json").read_text())["widths"]
    assert [row["held_out"] > 0.3 for row in rows] == [True] * 3  # 0.1 is chance


def test_any_network_of_the_example_is_prepared_and_pinned_alike():
    for make_net in NETS.values():
        model = plyweight.prepare(make_net(10), (2, 8), pinned={"conv1": 8, "linear": 8})
        assert plyweight.bit_widths_of(model) == (2, 8)
        assert int(model.linear.weight_quantizer.pinned) == 8
