"""The runs of benchmarks/accuracy.py: what they are, and how those that are done compare."""

import dataclasses
import json
import math
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cifar10_recipe import QuantizedRecipe

BIT_WIDTHS = (2, 3, 4, 6, 8)
ALL_WIDTHS = "layered-all"
# What of a recipe says how bit-widths share a run, and what calibration alone heeds.
AMONG_BIT_WIDTHS = {
    *("balance", "sampling", "num_random", "width_weights", "clip_weights", "rates", "teacher_of")
}
OF_CALIBRATION = ("activations", "batch_size", "calibration_batches")


@dataclass(frozen=True)
class Run:
    """One run, and the command that makes it.

    Attributes:
        name: "float", "layered", "layered-all", "dedicated-2" ... or "calibrated".
        seed: of everything in it.
    """

    name: str
    seed: int

    def __str__(self) -> str:
        return f"{self.name}:{self.seed}"

    @classmethod
    def parse(cls, text: str) -> "Run":
        """``layered:0``; raises ``ValueError`` where that is not its form."""
        name, seed = text.split(":")
        if name not in ("float", "layered", ALL_WIDTHS, "calibrated"):
            kind, _, bit_width = name.partition("-")
            if kind != "dedicated" or bit_width not in map(str, range(1, 9)):
                raise ValueError
        return cls(name, int(seed))

    def folder(self, runs: Path) -> Path:
        """Where it keeps what it made."""
        return runs / f"{self.name}-{self.seed}"

    def command(self, runs: Path) -> list[str]:
        """The arguments of examples/cifar10.py that are this run's own."""
        own = ["--seed", str(self.seed), "--out", str(self.folder(runs))]
        if self.name == "float":
            return [*own, "--method", "float"]
        if self.name == ALL_WIDTHS:
            own += ["--sampling", "all"]
        kind, _, single = self.name.partition("-")
        widths = [single] if kind == "dedicated" else map(str, BIT_WIDTHS)
        weights = Run("float", self.seed).folder(runs) / "float.safetensors"
        method = "calibrate" if kind == "calibrated" else "once-qat"
        return [*own, "--method", method, "--bit-widths", *widths, "--weights", str(weights)]


@dataclass(frozen=True)
class Found:
    """The runs that are done.

    Attributes:
        results: what results.json of each holds.
        predictions: what predictions.npz of each holds, labels included, uint8 ``(images,)``.
    """

    results: dict[Run, dict[str, Any]]
    predictions: dict[Run, dict[str, np.ndarray]]

    @classmethod
    def under(cls, runs: Path) -> "Found":
        """Read every run in the folder ``runs``."""
        results, predictions = {}, {}
        for path in sorted(runs.glob("*/results.json")):
            run = Run.parse(":".join(path.parent.name.rsplit("-", 1)))
            results[run] = json.loads(path.read_text())
            with np.load(path.parent / "predictions.npz") as arrays:
                predictions[run] = dict(arrays)
        check_alike(results)
        return cls(results, predictions)

    def of_kind(self, name: str) -> list[Run]:
        """The runs of that name."""
        return [run for run in self.results if run.name == name]

    def num_images(self, kind: str) -> int:
        """How many test images of that kind there are."""
        return max(results["num_images"][kind] for results in self.results.values())

    def right(self, run_name: str, network: str, kind: str) -> dict[int, np.ndarray]:
        """By seed, which images a network of a run got right, bool ``(images,)``."""
        return {
            run.seed: arrays[f"{network}/{kind}"] == arrays[f"labels/{kind}"]
            for run, arrays in self.predictions.items()
            if run.name == run_name and f"{network}/{kind}" in arrays
        }

    def rows(self, kind: str) -> list[dict[str, Any]]:
        """A row for each bit-width, widest first, in percent and points."""
        of_float = self.right("float", "float", kind)
        sizes = {
            row["bit_width"]: row["num_bytes"]
            for run, results in self.results.items()
            for row in results["widths"]
            if run.name == "layered"
        }
        rows = []
        for bit_width in sorted(sizes, reverse=True):
            network = str(bit_width)
            layered = self.right("layered", network, kind)
            all_widths = self.right(ALL_WIDTHS, network, kind)
            dedicated = self.right(f"dedicated-{bit_width}", network, kind)
            calibrated = self.right("calibrated", network, kind)
            rows.append(
                {
                    "bit_width": bit_width,
                    "num_bytes": sizes[bit_width],
                    "layered": percentages(layered),
                    "layered_to_float": difference(layered, of_float),
                    "dedicated": percentages(dedicated),
                    "layered_to_dedicated": difference(layered, dedicated),
                    "all_widths": percentages(all_widths),
                    "layered_to_all_widths": difference(layered, all_widths),
                    "calibrated": percentages(calibrated),
                    "calibrated_to_float": difference(calibrated, of_float),
                }
            )
        return rows

    def conditions(self) -> dict[str, Any]:
        """What all runs have in common, and how long each took."""
        layered = next(r for run, r in self.results.items() if run.name == "layered")
        of_float = [r for run, r in self.results.items() if run.name == "float"]
        device = layered["configuration"]["device"]
        return {
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {device}",
            "compile": layered["configuration"]["compile"],
            "versions": layered["versions"],
            "recipe": layered["configuration"]["recipe"],
            "float_recipe": of_float[0]["configuration"]["recipe"] if of_float else None,
            "seconds_of_training": {str(run): r["seconds"] for run, r in self.results.items()},
        }


def check_alike(results: dict[Run, dict[str, Any]]) -> None:
    """End with a sentence where runs were not made by one recipe: their table would be none."""
    own = ("bit_widths", "seed", "method", "float_weights", "recipe")
    first: dict[str, tuple[Run, Any]] = {}
    for run, result in results.items():
        configuration = dict(result["configuration"])
        facts = {k: v for k, v in configuration.items() if k not in own}
        for name, fact in (facts | recipe_in_effect(run, configuration["recipe"])).items():
            earlier, value = first.setdefault(name, (run, fact))
            if value != fact:
                sys.exit(
                    f"{earlier} and {run} differ in {name} ({value} and {fact}), so they cannot "
                    "stand in one table; move the folder of one of them away and start again."
                )


def recipe_in_effect(run: Run, recipe: dict[str, Any]) -> dict[str, Any]:
    """What ``recipe`` says and ``run`` heeds, fields that an older one did not have included."""
    if run.name == "float":
        return {f"{field} of the float network": value for field, value in recipe.items()}
    fields = {field.name: field.default for field in dataclasses.fields(QuantizedRecipe)}
    values = {k: v for k, v in fields.items() if v is not dataclasses.MISSING} | recipe
    if run.name == "calibrated":
        return {field: values[field] for field in OF_CALIBRATION}
    unheeded = set()
    if run.name == ALL_WIDTHS:
        unheeded = {"sampling", "num_random"}  # in which it differs, as its name says
    elif run.name != "layered":
        unheeded = AMONG_BIT_WIDTHS
    return {field: value for field, value in values.items() if field not in unheeded}


def percentages(right: dict[int, np.ndarray]) -> list[float]:
    """The accuracy of each seed."""
    return [round(100 * float(array.mean()), 3) for array in right.values()]


def difference(first: dict[int, np.ndarray], second: dict[int, np.ndarray]) -> list[float] | None:
    """The mean difference over the seeds that both have, in points, and its standard error.

    Paired image by image: what both get right or wrong alike does not count as uncertainty. The
    error is that of the choice of test images; of the choice of seeds speaks the range beside it.
    """
    seeds = first.keys() & second.keys()
    if not seeds:
        return None
    per_image = np.mean([first[s].astype(float) - second[s] for s in sorted(seeds)], axis=0)
    error = per_image.std(ddof=1) / math.sqrt(len(per_image))
    return [round(100 * float(per_image.mean()), 3), round(100 * float(error), 3)]
