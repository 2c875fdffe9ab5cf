"""The jobs of the CIFAR-10 example: train, pack, load what was packed, and score it.

A job is a folder. Each of its files appears whole and is of one configuration, so whatever is there
already need not be made again, and a folder of another configuration is left alone.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
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
from cifar10_logs import Log, say
from cifar10_nets import FIRST_AND_LAST, NETS
from cifar10_place import Place
from cifar10_recipe import QuantizedRecipe, Recipe, for_bit_widths
from cifar10_stages import Stage, float_stage, once_qat_stage
from torch import Tensor, nn

import plyweight
from plyweight.artifact import publish_atomically

__all__ = ["Job", "accuracy", "make", "predictions"]

Batches = list[tuple[Tensor, Tensor]]  # of normalized images, and labels

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
        DataError: If the images make no batch.
        Stopped: If Ctrl-C or SIGTERM came while training; a checkpoint is left.
        TrainingError: If the loss of the float network, or a parameter, is NaN or infinite.
        PlyweightError: If that of a bit-width is (``LossError``), or a file cannot be written.
    """
    check_batches(job, data, place)
    float_net, seconds = float_network(job, data, place)
    configuration = configuration_of(job, float_net, data, place)
    path = job.out / "results.json"
    if path.exists():
        results = read_results(path)
        refuse_another(path, results["configuration"], configuration)
        if not place.is_first:
            return None
        say(f"{path} is there already, so this run is done; give another --out for a new one.")
        return results
    model = None
    if job.method == "once-qat":
        model, seconds = trained_network(job, float_net, data, place, configuration)
    elif job.method == "calibrate":
        started = time.monotonic()
        model = calibrated_network(job, float_net, data).eval()
        seconds = time.monotonic() - started
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


def float_network(job: Job, data: Cifar10, place: Place) -> tuple[nn.Module, float]:
    """The float network of ``job``, and the seconds of training it.

    It is that of ``weights`` or one that was finished here before, in no time, or trained now.
    """
    job.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(job.seed)
    net = NETS[job.net](10).to(place.device)
    if job.weights is not None:
        load_weights(net, job.weights)
        return net.eval(), 0.0
    configuration = float_configuration(job, data, place)
    path, seconds = job.out / "float.safetensors", 0.0
    weights = read_finished_weights(path, configuration)
    if weights is None:
        stage = float_stage(net, data, job.float_recipe, seed=job.seed, place=place)

        def evaluate(network: nn.Module) -> dict[str, float]:
            return {"float": accuracy(predictions(network, shown), shown)}

        shown = shown_batches(data)
        run_stage(job, stage, configuration, evaluate)
        seconds = stage.history[-1]["seconds"]
        if place.is_first:
            write_finished_weights(path, configuration, net)
            checkpoint_of(job, stage).unlink(missing_ok=True)  # it has nothing left to resume
        place.wait()  # all go on from the very same file
        weights = read_finished_weights(path, configuration)
    give_weights(net, weights, where=path)
    return net.eval(), seconds


def calibrated_network(
    job: Job,
    float_net: nn.Module,
    data: Cifar10,
    *,
    clip_weights: Mapping[int, float] | None = None,
) -> nn.Module:
    """The layered network of ``job`` without training: its grids chosen from data."""
    model = prepared_network(job, float_net)
    steps = range(job.recipe.calibration_batches)
    size, seed = job.recipe.batch_size, job.seed
    plyweight.calibrate(
        model,
        [data.batch(step, size, seed=seed, is_augmented=False) for step in steps],
        weights=for_bit_widths(clip_weights, job.bit_widths),
    )
    return model


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
    if recipe.start == "calibrated":
        # Alike in all processes.
        model = calibrated_network(job, float_net, data, clip_weights=recipe.clip_weights)
    else:
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


def run_stage(
    job: Job,
    stage: Stage,
    configuration: Configuration,
    evaluate: Callable[[nn.Module], dict[str, float]],
) -> None:
    """Take the steps of ``stage`` that are left, from its checkpoint on if there is one."""
    path = checkpoint_of(job, stage)
    state = read_checkpoint(path, configuration)
    stage.place.wait()  # a stage that is over takes its checkpoint away: all have read it
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


def checkpoint_of(job: Job, stage: Stage) -> Path:
    """Where the checkpoint of ``stage`` is."""
    return job.out / f"{stage.name}.pt"


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
def predictions(net: nn.Module, batches: Batches) -> Tensor:
    """The label of the largest logit for every image, int64 ``(n,)``."""
    return torch.cat([net(images).argmax(dim=1) for images, _ in batches])


def accuracy(predicted: Tensor, batches: Batches) -> float:
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
        is_trained_here = job.weights is None  # by what is in the configuration already
        return configuration | ({} if is_trained_here else {"float_weights": digest_of(float_net)})
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


def shown_batches(data: Cifar10) -> Batches:
    """The first of the held-out images, enough to see where training goes."""
    images, labels = data.test_images[:NUM_SHOWN], data.test_labels[:NUM_SHOWN]
    return replace(data, test_images=images, test_labels=labels).test_batches()


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
