"""calibrate: a pretrained float network becomes good at every bit-width, without training.

For each batch the model runs once in float and once at every bit-width, and three things are
found on the way, each with those before it in effect (from the input to the output):

    clips    one per channel for all bit-widths jointly, from the weights alone
             (``quantizers/clip_search.py``)
    steps    at each bit-width, of the inputs that the layered network itself has there: the step
             with the least squared error on a fixed row of steps
    moments  of each output channel ``y_b``, at each bit-width, brought back to those of the same
             channel ``y`` in float on the same images:

                 k = std(y) / std(y_b)        k * (y_b - mean(y_b)) + mean(y)

Where the output goes straight into a batch norm, its row takes ``k`` and the means; elsewhere
the gain of the weight takes ``k`` and a row of the bias the means (``train/corrections.py``).
A module without a bias gets no mean (another bias would be another network), so before a batch
norm that all bit-widths share, a convolution without one keeps its deviations alone. A weight
whose outputs are not seen, since its module is never called, has the gain that fits it best.
Because both sides of the comparison see the same images, what these have of their own cancels:
a few hundred are enough, and without the augmentation of training they are about as good.

Sources: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction"
(ICCV 2019) and Finkelstein et al., "Fighting Quantization Bias with Bias" (CVPR Workshops 2019)
for the means; Banner et al., "Post Training 4-bit Quantization of Convolutional Networks for
Rapid-Deployment" (NeurIPS 2019) for the standard deviations and the search of clips.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import nn

from plyweight.codec import MAGNITUDES
from plyweight.errors import LayeringError
from plyweight.nn.bit_width import at_bit_width, bit_widths_of
from plyweight.nn.layered import LayeredModule
from plyweight.quantizers import ActivationQuantizer, Switchable
from plyweight.quantizers.clip_search import fitted_gain, joint_clip
from plyweight.train.batch_norm import check_arguments, inputs_of
from plyweight.train.corrections import Corrections, may_have_gains, users_of
from plyweight.train.width_weights import checked_weights

__all__ = ["calibrate"]


@torch.inference_mode(False)  # what is made inside could not be trained outside
@torch.no_grad()
def calibrate(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    num_batches: int | None = None,
    forward: Callable[[Any], object] | None = None,
    weights: Mapping[int, float] | None = None,
) -> None:
    """Choose clips, gains, steps, biases and batch-norm rows of every bit-width from data.

    What it comes near to is the model in float: its latent weights, which do not change, and
    the biases and batch-norm rows of the widest bit-width. So calibrate a pretrained network
    once. A few hundred samples are enough; the loader is read once, and batches are not kept. The
    model keeps its mode and bit-width. Gains and biases become other parameters (a row for each
    bit-width), so make an optimizer after that.

    Args:
        model: from :func:`plyweight.prepare`, with pretrained weights; changed in place.
        loader: gives batches: a tensor, or a tuple or list whose first item is the input.
        num_batches: how many to use; None for all.
        forward: ``forward(batch)`` runs the model on a batch of any other kind.
        weights: how much each bit-width counts where they share a clip; None for all equal.

    Raises:
        LayeringError: If the model is not layered, an argument is wrong, the loader gives no
            batch or one of a kind that is not known, or activations are not finite. The model is
            then as it was, and also if the loader or the model fails.
        BitWidthError: If ``weights`` names a bit-width that the model does not have.
    """
    check_arguments(model, loader, num_batches, forward)
    bit_widths = bit_widths_of(model)
    counts = checked_weights(weights, bit_widths)
    if not any(isinstance(module, LayeredModule) for module in model.modules()):
        raise LayeringError(
            f"{type(model).__name__} has no latent weights to calibrate; take a model from "
            "plyweight.prepare, or load with form='fake-quantized'."
        )
    run = forward or (lambda batch: model(inputs_of(batch)))
    is_first = True
    with _as_it_was_on_error(model), _in_evaluation(model):
        _set_clips(model, counts)
        corrections = Corrections(model, bit_widths)
        for batch in islice(loader, num_batches):
            with corrections.watching_float():
                run(batch)
            if is_first:
                for module in corrections.uncalled():
                    _fit_gains(module)
            is_first = False
            for bit_width in reversed(bit_widths):  # a pinned weight takes its gain at the widest
                with at_bit_width(model, bit_width), corrections.correcting(bit_width):
                    run(batch)
        if is_first:
            raise LayeringError("the loader gave no batch; calibrate needs at least one.")
        corrections.finish()


def _set_clips(model: nn.Module, counts: Mapping[int, float]) -> None:
    """The joint clip of every weight; gains are 1, or fitted where they are not corrected."""
    for quantizer, modules in users_of(model).items():
        own = dict.fromkeys(quantizer.own_bit_widths, 0.0)
        for bit_width, count in counts.items():
            own[max(bit_width, int(quantizer.pinned))] += count
        weight, group_size = modules[0].latent_weight, int(quantizer.group_size) or None
        clip = joint_clip(weight, tuple(own), group_size=group_size, weights=own)
        quantizer.set_grid(clip / MAGNITUDES, {})
        if not may_have_gains(modules):
            _fit_gains(modules[0])


def _fit_gains(module: LayeredModule) -> None:
    """One gain for the whole weight at each bit-width, at the least squared error."""
    quantizer, weight = module.weight_quantizer, module.latent_weight
    clip, group_size = quantizer.scale * MAGNITUDES, int(quantizer.group_size) or None
    own = quantizer.own_bit_widths
    fits = {b: fitted_gain(weight, clip, b, group_size=group_size) for b in own}
    quantizer.set_grid(quantizer.scale, {b: torch.tensor([fit]) for b, fit in fits.items()})


@contextmanager
def _in_evaluation(model: nn.Module) -> Iterator[None]:
    """Inside, everything computes as in evaluation; then in the modes it had."""
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in was_training.items():
            module.training = training


@contextmanager
def _as_it_was_on_error(model: nn.Module) -> Iterator[None]:
    """Give ``model`` back what calibration changes, if it fails inside."""
    changing = [m for m in model.modules() if isinstance(m, (Switchable, LayeredModule))]
    latent = {id(m.latent_weight) for m in changing if isinstance(m, LayeredModule)}
    places = [(m, dict(m._parameters), dict(m._buffers)) for m in changing]
    tensors = [t for _, own, buffers in places for t in (*own.values(), *buffers.values())]
    values = [(t, t.clone()) for t in tensors if t is not None and id(t) not in latent]
    kinds = {m: m.kind for m in changing if isinstance(m, ActivationQuantizer)}
    try:
        yield
    except BaseException:
        for module, parameters, buffers in places:
            module._parameters.update(parameters)
            module._buffers.update(buffers)
        for tensor, value in values:
            tensor.copy_(value)
        for quantizer, kind in kinds.items():
            quantizer.kind = kind
        raise
