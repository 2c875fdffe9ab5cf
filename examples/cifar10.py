"""From CIFAR-10 to one layered artifact: float training, once-QAT, packing, and its accuracy.

    python examples/cifar10.py --data FOLDER --net resnet20
    python examples/cifar10.py --data FOLDER --net resnet20 --weights resnet20.safetensors
    torchrun --nproc-per-node 4 examples/cifar10.py --data FOLDER --net resnet18 --amp

FOLDER is what torchvision.datasets.CIFAR10 downloads to. In the folder --out appear

    float.safetensors          the float network, which --weights takes in other runs
    NET.layered.safetensors    the artifact: every bit-width is a prefix of it
    results.json               accuracy of the *loaded* artifact at every bit-width
    predictions.npz            what it took every test image for, by bit-width, and the labels
    float.csv, once-qat.csv    a row for each epoch; with --tensorboard, events beside them
    float.pt, once-qat.pt      checkpoints; the first is there while the float network is trained

A run that was stopped or killed goes on when the same command is given again, and packs the same
bytes (on a CPU) as if it had not been. The first and last module are pinned to 8 bits.

Exit codes: 0 done, 1 it failed, 2 called wrongly, 130 and 143 stopped by Ctrl-C or SIGTERM.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from cifar10_checkpoints import (
    CheckpointError,
    Configuration,
    digest_of,
    give_weights,
    load_weights,
    read_checkpoint,
    read_finished_weights,
    refuse_another,
    write_checkpoint,
    write_finished_weights,
)
from cifar10_data import Cifar10, DataError
from cifar10_logs import Log, LogError, summary_writer_class
from cifar10_nets import FIRST_AND_LAST, NETS
from cifar10_place import COMPILE_MODES, Place, place_of_this_process
from cifar10_recipe import BALANCES, QuantizedRecipe, Recipe, recipes_for
from cifar10_stages import Stage, Stopped, TrainingError, float_stage, once_qat_stage
from torch import Tensor, nn

import plyweight
from plyweight.artifact import publish_atomically
from plyweight.quantizers import checked_bit_widths

__all__ = ["Job", "main", "make"]

PINNED_BIT_WIDTH = 8
NUM_SHOWN = 2_000  # held-out images of the accuracies shown while training; all are for the end
# Stages draw different images even where their seeds are those of neighbouring runs.
SEED_OF_ONCE_QAT = 10_000


@dataclass(frozen=True, kw_only=True)
class Job:
    """An artifact to make.

    Attributes:
        net: a key of ``NETS``.
        bit_widths: of the artifact; a single one makes a dedicated model.
        seed: of initialization, order of images, augmentation and sampling.
        float_recipe: how the float network is trained.
        recipe: how once-QAT goes on from it.
        out: folder of everything that comes of it.
        weights: float weights to start from; None to train them.
        method: "once-qat"; or "float" to end with the float network; or "calibrate" to choose the
            grids from data, without training.
        save_every: steps between checkpoints; None for an epoch.
        to_tensorboard: whether to log for TensorBoard too.
    """

    net: str
    bit_widths: tuple[int, ...]
    seed: int
    float_recipe: Recipe
    recipe: QuantizedRecipe
    out: Path
    weights: Path | None = None
    method: Literal["once-qat", "calibrate", "float"] = "once-qat"
    save_every: int | None = None
    to_tensorboard: bool = False

    @property
    def artifact(self) -> Path:
        """The file that is made."""
        return self.out / f"{self.net}.layered.safetensors"


def make(job: Job, data: Cifar10, place: Place) -> dict[str, Any] | None:
    """Train what is not trained yet, pack it, load it, score it: what results.json holds.

    Returns:
        None in all processes but the first.

    Raises:
        CheckpointError: If the folder has a run of another configuration, or weights do not fit.
        PlyweightError: If a loss is NaN, the bit-widths are wrong, or a file cannot be written.
    """
    check_batches(job, data, place)
    float_net = float_network(job, data, place)
    configuration = configuration_of(job, float_net, data, place)
    path = job.out / "results.json"
    if path.exists():
        results = read_results(path)
        refuse_another(path, results["configuration"], configuration)
        say(f"{path} is there already, so this run is done; give another --out for a new one.")
        return results
    model, seconds = None, 0.0
    if job.method == "once-qat":
        model, seconds = trained_network(job, float_net, data, place, configuration)
    elif job.method == "calibrate":
        model, seconds = calibrated_network(job, float_net, data)
    if not place.is_first:
        return None
    if model is not None:
        plyweight.pack(model, job.artifact)
    results, predicted = scored(job, float_net, data, place.device)
    results |= {
        "configuration": configuration,
        "seconds": round(seconds, 1),
        "versions": {name: version(name) for name in ("plyweight", "torch")},
    }
    with publish_atomically(job.out / "predictions.npz") as file:
        np.savez_compressed(file, **predicted)
    with publish_atomically(path) as file:
        file.write((json.dumps(results, indent=1) + "\n").encode())
    return results


def float_network(job: Job, data: Cifar10, place: Place) -> nn.Module:
    """The float network of ``job``: from ``weights``, from an earlier run, or trained now."""
    job.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(job.seed)
    net = NETS[job.net](10).to(place.device)
    if job.weights is not None:
        load_weights(net, job.weights)
        return net.eval()
    configuration = float_configuration(job, data, place)
    path = job.out / "float.safetensors"
    weights = read_finished_weights(path, configuration)
    if weights is None:
        stage = float_stage(net, data, job.float_recipe, seed=job.seed, place=place)

        def evaluate(network: nn.Module) -> dict[str, float]:
            return {"float": accuracy(predictions(network, shown), shown)}

        shown = shown_batches(data)
        run_stage(job, stage, configuration, evaluate)
        if place.is_first:
            write_finished_weights(path, configuration, net)
            (job.out / f"{stage.name}.pt").unlink()  # it has nothing left to resume
        place.wait()  # all go on from the very same file
        weights = read_finished_weights(path, configuration)
    give_weights(net, weights, where=path)
    return net.eval()


def calibrated_network(job: Job, float_net: nn.Module, data: Cifar10) -> tuple[nn.Module, float]:
    """The layered network of ``job`` without training, and the seconds it took."""
    started = time.monotonic()
    model = prepared_network(job, float_net)
    steps = range(job.recipe.calibration_batches)
    size, seed = job.recipe.batch_size, job.seed
    batches = [data.batch(step, size, seed=seed, is_augmented=False) for step in steps]
    plyweight.calibrate(model, batches)
    return model.eval(), time.monotonic() - started


def prepared_network(job: Job, float_net: nn.Module) -> nn.Module:
    """A layered copy of ``float_net``, its first and last module pinned."""
    return plyweight.prepare(
        float_net,
        job.bit_widths,
        activations=job.recipe.activations,
        pinned=dict.fromkeys(FIRST_AND_LAST, PINNED_BIT_WIDTH),
    )


def trained_network(
    job: Job, float_net: nn.Module, data: Cifar10, place: Place, configuration: Configuration
) -> tuple[nn.Module, float]:
    """The layered network of ``job``, trained and recalibrated, and the seconds of training."""
    recipe, seed = job.recipe, job.seed + SEED_OF_ONCE_QAT
    torch.manual_seed(seed)
    model = prepared_network(job, float_net)
    teacher = place.compiled(float_net) if recipe.teacher == "float" else None
    stage = once_qat_stage(model, data, recipe, teacher=teacher, seed=seed, place=place)
    shown = shown_batches(data)

    def evaluate(network: nn.Module) -> dict[str, float]:
        accuracies = {}
        for bit_width in job.bit_widths:
            with plyweight.at_bit_width(network, bit_width):
                accuracies[str(bit_width)] = accuracy(predictions(network, shown), shown)
        return accuracies

    run_stage(job, stage, configuration, evaluate)
    trained = stage.trained
    if place.is_first:
        # The images of an epoch more, augmented as in training.
        steps = range(stage.num_steps, stage.num_steps + recipe.recalibration_batches)
        batches = (data.batch(step, recipe.batch_size, seed=seed)[0] for step in steps)
        plyweight.recalibrate(trained, batches)
    return trained.eval(), stage.history[-1]["seconds"]


def run_stage(job: Job, stage: Stage, configuration: Configuration, evaluate: Any) -> None:
    """Take the steps of ``stage`` that are left, from its checkpoint on if there is one."""
    path = job.out / f"{stage.name}.pt"
    state = read_checkpoint(path, configuration)
    if state is not None:
        stage.load_state_dict(state)
    log = Log(
        job.out,
        stage.name,
        num_steps=stage.num_steps,
        num_epochs=stage.recipe.epochs,
        is_shown=stage.place.is_first,
        to_tensorboard=job.to_tensorboard,
    )
    with log:
        log.resume(stage.step, stage.history)
        stage.run(
            log=log,
            save=lambda state: write_checkpoint(path, configuration, state),
            evaluate=evaluate,
            save_every=job.save_every,
        )


def scored(
    job: Job, float_net: nn.Module, data: Cifar10, device: torch.device
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The accuracies of the artifact of ``job``, loaded at every bit-width, and its predictions."""
    sets = {"held_out": data.test_batches(), "official": data.test_batches(official=True)}
    predicted: dict[str, np.ndarray] = {}

    def score(net: nn.Module, name: str) -> dict[str, float]:
        accuracies = {}
        for kind, batches in sets.items():
            if batches:
                labels = predictions(net, batches)
                predicted[f"{name}/{kind}"] = labels.cpu().numpy().astype(np.uint8)
                accuracies[kind] = accuracy(labels, batches)
        return accuracies

    for kind, batches in sets.items():
        labels = torch.cat([labels for _, labels in batches]) if batches else torch.empty(0)
        predicted[f"labels/{kind}"] = labels.cpu().numpy().astype(np.uint8)
    results = {
        "method": job.method,
        "num_images": {kind: sum(len(y) for _, y in batches) for kind, batches in sets.items()},
        "float": score(float_net, "float"),
        "widths": [],
    }
    if job.method == "float":
        return results, predicted
    sizes = {layer.bit_width: layer.total_bytes for layer in plyweight.inspect(job.artifact).layers}
    for bit_width in job.bit_widths:
        architecture = NETS[job.net](10).to(device)
        loaded = plyweight.load(job.artifact, architecture, bit_width=bit_width)
        row = {"bit_width": bit_width, "num_bytes": sizes[bit_width]}
        results["widths"].append(row | score(loaded, str(bit_width)))
    return results, predicted


@torch.no_grad()
def predictions(net: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The label of the largest logit for every image, int64 ``(n,)``."""
    return torch.cat([net(images).argmax(dim=1) for images, _ in batches])


def accuracy(predicted: Tensor, batches: list[tuple[Tensor, Tensor]]) -> float:
    """The share of the images in ``batches`` whose label was predicted, 0 to 1."""
    labels = torch.cat([labels for _, labels in batches])
    return float((predicted == labels).double().mean())


def float_configuration(job: Job, data: Cifar10, place: Place) -> Configuration:
    """Everything that decides what the float network becomes."""
    return {
        "net": job.net,
        "seed": job.seed,
        "images": {"num_train": len(data.train_images), "crc32": data.fingerprint},
        "recipe": plain(job.float_recipe),
        "device": place.device.type,
        "num_processes": place.num_processes,
        "compile": place.compile,
        "amp": place.is_mixed,
    }


def configuration_of(job: Job, float_net: nn.Module, data: Cifar10, place: Place) -> Configuration:
    """Everything that decides what comes out."""
    configuration = float_configuration(job, data, place) | {"method": job.method}
    if job.method == "float":
        return configuration
    return configuration | {
        "bit_widths": list(job.bit_widths),
        "recipe": plain(job.recipe),
        "float_weights": digest_of(float_net),
    }


def check_batches(job: Job, data: Cifar10, place: Place) -> None:
    """Whole batches can be made of the images, and equal parts of a batch.

    Raises:
        DataError: If not.
    """
    size, count = job.recipe.batch_size, len(data.train_images)
    if data.steps_per_epoch(size) == 0:
        raise DataError(
            f"{count:,} images to train on make no batch of {size}; give more images or a smaller "
            "--batch-size."
        )
    if size % place.num_processes:
        raise DataError(
            f"a batch of {size} cannot be shared by {place.num_processes} processes; give a "
            "--batch-size that is a multiple."
        )


def shown_batches(data: Cifar10) -> list[tuple[Tensor, Tensor]]:
    """The first of the held-out images, enough to see where training goes."""
    size = 125
    return data.test_batches(size)[: NUM_SHOWN // size]


def plain(recipe: Recipe) -> dict[str, Any]:
    """``recipe`` in values that JSON keeps as they are."""
    return json.loads(json.dumps(asdict(recipe)))


def read_results(path: Path) -> dict[str, Any]:
    """What an earlier run found.

    Raises:
        CheckpointError: If the file is damaged.
    """
    try:
        results = json.loads(path.read_bytes())
        if isinstance(results["configuration"], dict):
            return results
    except (ValueError, TypeError, KeyError, OSError):
        pass
    raise CheckpointError(f"{path} holds no results; move it away to score the artifact again.")


def say(sentence: str) -> None:
    """To whoever waits at the terminal; results go to stdout."""
    print(f"cifar10: {sentence}", file=sys.stderr)


def as_table(results: dict[str, Any]) -> str:
    """A line for each bit-width, in percent, with the difference to the float network."""
    kinds = [kind for kind, count in results["num_images"].items() if count]
    titles = [f"{results['num_images'][kind]:,} {kind.replace('_', '-')}" for kind in kinds]
    lines = [" ".join([f"{'bits':>5}  {'bytes':>10}", *(f"{title:>24}" for title in titles)])]
    of_float = results["float"]
    figures = " ".join(f"{of_float[kind]:>16.2%}{'':8}" for kind in kinds)
    lines.append(f"{'float':>5}  {'':>10} {figures}")
    for row in results["widths"]:
        figures = " ".join(
            f"{row[kind]:>16.2%} ({100 * (row[kind] - of_float[kind]):+.2f})" for kind in kinds
        )
        lines.append(f"{row['bit_width']:>5}  {row['num_bytes']:>10,} {figures}")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """What a person types."""
    description, epilog = __doc__.split("\n\n", 1)
    made = argparse.ArgumentParser(
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = made.add_argument
    add("--data", type=Path, required=True, metavar="FOLDER", help="CIFAR-10, see below")
    add("--out", type=Path, metavar="FOLDER", help="default: runs/NET-SEED")
    add("--net", choices=list(NETS), default="resnet20")
    add("--bit-widths", type=int, nargs="*", default=[2, 3, 4, 6, 8], metavar="B")
    add("--seed", type=int, default=0)
    add("--weights", type=Path, metavar="FILE", help="float weights, .safetensors or .pt")
    add(
        "--method",
        choices=["once-qat", "calibrate", "float"],
        default="once-qat",
        help="calibrate: choose the grids without training; float: end with the float network",
    )
    add("--num-train", type=int, metavar="N", help="train on the first N images only")
    add("--batch-size", type=positive, metavar="N", help="of all processes together")
    add("--save-every", type=positive, metavar="STEPS", help="default: once an epoch")
    add("--tensorboard", action="store_true", help="log for TensorBoard too")
    place = made.add_argument_group("where it computes")
    place.add_argument("--device", help="cpu, cuda ...; default: a GPU if there is one")
    place.add_argument("--compile", choices=list(COMPILE_MODES), default="none")
    place.add_argument("--amp", action="store_true", help="bfloat16 where that is safe")
    first = made.add_argument_group("float training (defaults: by network)").add_argument
    first("--float-epochs", type=positive, metavar="N")
    first("--float-learning-rate", type=float, metavar="X")
    first("--float-weight-decay", type=float, metavar="X")
    then = made.add_argument_group("once-QAT (defaults: by network)").add_argument
    then("--epochs", type=positive, metavar="N")
    then("--learning-rate", type=float, metavar="X")
    then("--weight-decay", type=float, metavar="X")
    then("--balance", choices=BALANCES)
    then("--sampling", choices=["all", "sandwich"])
    then("--num-random", type=int, metavar="N", help="bit-widths between, for the sandwich rule")
    then("--width-weights", type=by_bit_width, metavar="B=X,...", help="such as 2=2,3=1.5")
    then("--teacher", choices=["none", "float"], help="of the widest bit-width")
    then("--moment-weight", type=float, metavar="X", help="penalty on skewness and kurtosis")
    then("--damping-weight", type=float, metavar="X", help="penalty on oscillation, at the end")
    then("--scale-rate", type=float, metavar="X", help="learning rate of scales, as a multiple")
    then("--rates", type=by_bit_width, metavar="B=X,...", help="learning rates, as multiples")
    then("--ema-decay", type=float, metavar="X", help="pack a moving average of the weights")
    then("--clip-value", type=float, metavar="X", help="largest entry of a gradient")
    then("--recalibration-batches", type=positive, metavar="N")
    return made


def positive(text: str) -> int:
    """An integer of 1 or more."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def by_bit_width(text: str) -> dict[int, float]:
    """``2=2,3=1.5`` as a mapping."""
    pairs = (pair.split("=") for pair in text.split(","))
    return {int(bit_width): float(value) for bit_width, value in pairs}


def job_of(options: argparse.Namespace) -> Job:
    """The job that was typed.

    Raises:
        PlyweightError: If the bit-widths are wrong.
    """
    float_recipe, recipe = recipes_for(options.net)
    given = {name: value for name, value in vars(options).items() if value is not None}
    changes = {f.name: given[f.name] for f in fields(QuantizedRecipe) if f.name in given}
    float_changes = {
        f.name: given[f"float_{f.name}"] for f in fields(Recipe) if f"float_{f.name}" in given
    }
    if options.batch_size:
        float_changes["batch_size"] = options.batch_size
    return Job(
        net=options.net,
        bit_widths=checked_bit_widths(options.bit_widths),
        seed=options.seed,
        float_recipe=replace(float_recipe, **float_changes),
        recipe=replace(recipe, **changes),
        out=options.out or Path("runs") / f"{options.net}-{options.seed}",
        weights=options.weights,
        method=options.method,
        save_every=options.save_every,
        to_tensorboard=options.tensorboard,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example with ``argv`` (``sys.argv[1:]`` if None); the exit code."""
    options = parser().parse_args(argv)
    try:
        job = job_of(options)
        if job.to_tensorboard:
            summary_writer_class()  # missed now, not after the float training
    except (plyweight.PlyweightError, LogError) as error:
        say(str(error))
        return 2
    try:
        with place_of_this_process(
            options.device, compile=options.compile, is_mixed=options.amp
        ) as place:
            data = Cifar10.load(options.data, num_train=options.num_train).to(place.device)
            results = make(job, data, place)
    except Stopped as stopped:
        say(f"{stopped}; give the same command again to go on.")
        return 128 + stopped.signal_number  # as shells count
    except KeyboardInterrupt:
        say("interrupted; give the same command again to go on.")
        return 130
    except (
        plyweight.PlyweightError,
        CheckpointError,
        DataError,
        TrainingError,
        ImportError,
        OSError,
    ) as error:
        say(str(error))
        return 1
    if results is not None:
        print(f"{job.out}\n{as_table(results)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
