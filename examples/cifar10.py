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
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from cifar10_checkpoints import CheckpointError
from cifar10_data import NUM_SEEDS, Cifar10, DataError
from cifar10_jobs import SEED_OF_ONCE_QAT, Job, make
from cifar10_logs import LogError, say, summary_writer_class
from cifar10_nets import NETS
from cifar10_place import COMPILE_MODES, PlaceError, place_of_this_process
from cifar10_recipe import BALANCES, QuantizedRecipe, Recipe, for_bit_widths, recipes_for
from cifar10_stages import Stopped, TrainingError

import plyweight
from plyweight.errors import listed
from plyweight.quantizers import checked_bit_widths
from plyweight.train.balance import balance_named
from plyweight.train.width_weights import checked_weights

__all__ = ["main"]


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
    add("--seed", type=seed, default=0)
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
    first("--float-learning-rate", type=amount, metavar="X")
    first("--float-weight-decay", type=amount, metavar="X")
    then = made.add_argument_group("once-QAT (defaults: by network)").add_argument
    then("--epochs", type=positive, metavar="N")
    then("--learning-rate", type=amount, metavar="X")
    then("--weight-decay", type=amount, metavar="X")
    then("--start", choices=["prepared", "calibrated"], help="grids that training starts from")
    then("--clip-weights", type=by_bit_width, metavar="B=X,...", help="in clips of that start")
    then("--balance", choices=BALANCES)
    then("--sampling", choices=["all", "sandwich"])
    then("--num-random", type=count, metavar="N", help="bit-widths between, in the sandwich rule")
    then("--width-weights", type=by_bit_width, metavar="B=X,...", help="such as 2=2,3=1.5")
    then("--teacher", choices=["none", "float"], help="beside the labels")
    then("--teacher-of", choices=["widest", "all"], help="the bit-widths that learn from it")
    then("--moment-weight", type=amount, metavar="X", help="penalty on skewness and kurtosis")
    then("--damping-weight", type=amount, metavar="X", help="penalty on oscillation, at the end")
    then("--scale-rate", type=amount, metavar="X", help="learning rate of scales, as a multiple")
    then("--rates", type=rates, metavar="B=X,...", help="of own rows, as multiples; or: inverse")
    then("--ema-decay", type=share, metavar="X", help="pack a moving average of the weights")
    then("--clip-value", type=amount, metavar="X", help="largest entry of a gradient")
    then("--recalibration-batches", type=positive, metavar="N")
    return made


def positive(text: str) -> int:
    """An integer of 1 or more."""
    if count(text) == 0:
        raise argparse.ArgumentTypeError("0 is too few; give 1 or more")
    return count(text)


def count(text: str) -> int:
    """An integer of 0 or more."""
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative; give 0 or more")
    return int(text)


def seed(text: str) -> int:
    """An integer of 0 or more, with which both stages have one that generators take."""
    end = NUM_SEEDS - SEED_OF_ONCE_QAT
    if count(text) >= end:
        raise argparse.ArgumentTypeError(f"{text} is too large; give less than {end}")
    return count(text)


def amount(text: str) -> float:
    """A finite number of 0 or more."""
    if not 0 <= float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} cannot be meant; give a number of 0 or more")
    return float(text)


def share(text: str) -> float:
    """A number from 0 on, less than 1."""
    if not 0 <= float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} cannot be meant; give a number from 0 to below 1")
    return float(text)


def by_bit_width(text: str) -> dict[int, float]:
    """``2=2,3=1.5`` as a mapping."""
    pairs = (pair.split("=") for pair in text.split(","))
    return {int(bit_width): amount(value) for bit_width, value in pairs}


def rates(text: str) -> dict[int, float] | str:
    """``inverse``, or by bit-width."""
    return text if text == "inverse" else by_bit_width(text)


def job_of(options: argparse.Namespace) -> Job:
    """The job that was typed.

    Raises:
        PlyweightError: If the bit-widths are wrong, or options by bit-width are of others.
    """
    bit_widths = checked_bit_widths(options.bit_widths)
    check_named("--width-weights", options.width_weights, bit_widths)
    check_named("--clip-weights", options.clip_weights, bit_widths)
    if options.rates != "inverse":
        check_named("--rates", options.rates, bit_widths)
    for weights in (options.width_weights, options.clip_weights):
        checked_weights(for_bit_widths(weights, bit_widths), bit_widths)
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
        bit_widths=bit_widths,
        seed=options.seed,
        float_recipe=replace(float_recipe, **float_changes),
        recipe=replace(recipe, **changes),
        out=options.out or Path("runs") / f"{options.net}-{options.seed}",
        weights=options.weights,
        method=options.method,
        save_every=options.save_every,
        to_tensorboard=options.tensorboard,
    )


def check_named(
    option: str, values: Mapping[int, float] | None, bit_widths: tuple[int, ...]
) -> None:
    """Options by bit-width name those that are made.

    A single bit-width may be given what is meant for all: a dedicated model is made by the options
    of the layered one, as benchmarks/accuracy.py does.

    Raises:
        LayeringError: If not.
    """
    others = [b for b in values or {} if b not in bit_widths]
    if others and len(bit_widths) > 1:
        raise plyweight.LayeringError(
            f"{option} names {listed(others)}, but --bit-widths are {listed(bit_widths)}; name "
            "only those."
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example with ``argv`` (``sys.argv[1:]`` if None); the exit code."""
    options = parser().parse_args(argv)
    is_first = True  # of several processes
    try:
        job = job_of(options)
        if job.to_tensorboard:
            summary_writer_class()  # missed now, not after the float training
        balance_named(job.recipe.balance)  # likewise
    except (plyweight.PlyweightError, LogError, ImportError) as error:
        say(str(error))
        return 2
    try:
        with place_of_this_process(
            options.device, compile=options.compile, is_mixed=options.amp
        ) as place:
            is_first = place.is_first
            data = Cifar10.load(options.data, num_train=options.num_train).to(place.device)
            results = make(job, data, place)
    except Stopped as stopped:
        if is_first:
            say(f"{stopped}; give the same command again to go on.")
        return 128 + stopped.signal_number  # as shells count
    except KeyboardInterrupt:
        say("interrupted; give the same command again to go on.")
        return 130
    except PlaceError as error:
        say(str(error))
        return 2
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
