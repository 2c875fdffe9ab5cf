"""The verbs of loading.

A loaded model holds layers 0 to k of its artifact. `load` reads those and not a byte beyond,
`upgrade` reads only the layers still missing and takes them once all are verified, `downgrade`
gives the planes above back.

Other threads may compute with the model, or change it, at any time. Each of their calls holds a
lease (see :mod:`plyweight.nn.lease`), and a change waits for them only when all it takes is there:
what is slow, reading, verifying and uploading, keeps nobody waiting. Changes come one after the
other in the order in which they are ready, so the last one decides about the bit-width, and a slow
upgrade does not hold off a downgrade.
"""

import logging
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from threading import Thread
from typing import Literal, Unpack

import torch
from torch import nn

from plyweight.delivery import FetchOptions
from plyweight.delivery.reading import Address, opened_at
from plyweight.errors import ArtifactError, LayeringError
from plyweight.kernels import Mode
from plyweight.loading.held import HeldLayers, ReadyLayer, tensor_of
from plyweight.loading.placing import (
    give_rows,
    place_layered,
    place_outputs,
    place_packed,
    plain_shapes,
)
from plyweight.nn.bit_width import switch
from plyweight.nn.lease import change, grant_leases, require_no_lease
from plyweight.nn.skeleton import Skeleton

__all__ = ["downgrade", "load", "start_upgrade", "upgrade"]

Form = Literal["packed", "fake-quantized"]


@torch.inference_mode(False)  # what is made inside could not be changed outside
def load(
    source: Address,
    model: nn.Module,
    *,
    bit_width: int | None = None,
    form: Form = "packed",
    kernel: str = "reference",
    mode: Mode = "float",
    **options: Unpack[FetchOptions],
) -> nn.Module:
    """A copy of ``model`` with the weights of an artifact, in evaluation mode.

    Reads the header and the layers up to ``bit_width``, each verified before it is used. The
    result computes what the trained model computed at each bit-width: on the CPU and in the dtype
    it was trained in, bit for bit.

    In packed form it may be called by any number of threads while others change its bit-width:
    every call computes at one from start to end. See :func:`plyweight.lease` for several calls.

    Args:
        source: a URL, of which what is missing is fetched into the cache; or a file, whole or cut
            at the end of a layer.
        model: the float architecture, on the device and in the dtype to compute in; its weights
            are not used (it may be on the meta device) and it is not changed.
        bit_width: the widest to hold, and the one to compute at; None for all that is there.
        form: "packed": resident are the planes, for inference, :func:`upgrade` and
            :func:`downgrade`. "fake-quantized": resident are float latent weights, to go on
            training at the bit-widths held.
        kernel: what linear modules multiply with in packed form, as for
            :func:`plyweight.set_kernel`; with another than the default, the planes go straight
            into its layout.
        mode: of the kernel, likewise.
        options: of :func:`plyweight.fetch`: limits in place of ``bit_width``, whom to believe, how
            to fetch. For a file: ``max_bytes``, ``max_ram`` and ``artifact_id``.

    Raises:
        BitWidthError: If that bit-width is not stored, or the file is cut before it.
        ArtifactError: If the file is damaged; the message names layer and tensor.
        ModelMismatchError: If the model is not that of the artifact; names are on both sides.
        KernelError: If the kernel is not here, or cannot compute that.
        LayeringError: If an argument is wrong, or the model has values that no artifact gives.
        TrustError: If the artifact is not the one that is trusted.
        DeliveryError: If it cannot be read or does not arrive, or not even the base layer fits.
    """
    if form not in ("packed", "fake-quantized"):
        raise LayeringError(f"form is {form!r}; give 'packed' or 'fake-quantized'.")
    if form != "packed" and (kernel, mode) != ("reference", "float"):
        raise LayeringError(
            f"the kernel {kernel!r} was asked for, but only packed models have one."
        )
    reader, target = opened_at(source, bit_width, options)
    header = reader.header
    num_layers = header.layer_index(target) + 1
    plain = plain_shapes(header)
    weights = {param: record.shape for param, record in header.weights.items()}
    skeleton = Skeleton(model, frozenset(plain) | frozenset(weights))
    skeleton.check(weights | plain)
    layers = [reader.read_layer(i) for i in range(num_layers)]
    for name in plain:
        skeleton.set(name, tensor_of(layers[0][name]))
    held = header.bit_widths[:num_layers]
    if form == "packed":
        place_packed(skeleton, header, layers[0], kernel=kernel, mode=mode)
        placed = header.bit_widths
    else:
        place_layered(skeleton, header, layers, held)
        placed = held
    place_outputs(skeleton, header, placed)
    give_rows(skeleton.model, header, placed)
    loaded = HeldLayers(header, skeleton.model)
    for index, views in enumerate(layers):
        loaded.take(index, loaded.ready(index, views))
    skeleton.check_complete()
    switch(skeleton.model, target)
    if form == "packed":
        skeleton.model.requires_grad_(False)
        loaded.remember()
        grant_leases(skeleton.model)
    return skeleton.model.eval()


def upgrade(
    model: nn.Module,
    source: Address,
    *,
    bit_width: int | None = None,
    **options: Unpack[FetchOptions],
) -> None:
    """Let ``model`` hold and compute at ``bit_width``: reads only the layers it lacks.

    Other threads compute at the earlier bit-width until all layers are there. What others upgraded
    in the meantime is not taken twice, and what they downgraded is read again, so afterwards the
    model holds ``bit_width``, whatever it held before.

    Args:
        model: from :func:`load`, in packed form.
        source: of the same artifact.
        bit_width: None for the widest that the source holds. For one that the model holds
            already, nothing is read, and nothing is freed (see :func:`downgrade`).
        options: as for :func:`load`; the artifact's id is that of the model's.

    Raises:
        BitWidthError: If that bit-width is not stored, or the source is cut before it.
        ArtifactError: If the source is damaged or another artifact. The model stays as it was.
        LayeringError: If the model was not loaded in packed form, or this thread holds a lease
            of it.
        DeliveryError: If the source cannot be read or does not arrive.
    """
    _upgrade(model, source, bit_width, Future(), options)


def start_upgrade(
    model: nn.Module,
    source: Address,
    *,
    bit_width: int | None = None,
    callback: Callable[[Future[int]], object] | None = None,
    **options: Unpack[FetchOptions],
) -> Future[int]:
    """:func:`upgrade` in a thread of its own, which does not keep the interpreter from exiting.

    Args:
        model: from :func:`load`, in packed form.
        source: of the same artifact.
        bit_width: None for the widest that the source holds.
        callback: called with the future when it is done, failed or cancelled, as by
            ``Future.add_done_callback``. Without one, a failure is logged as well.
        options: as for :func:`upgrade`.

    Returns:
        The future bit-width. ``result()`` waits and raises what :func:`upgrade` would;
        ``cancel()`` is heard until the model changes, and then leaves it as it was.

    Raises:
        LayeringError: If the model was not loaded in packed form.
    """
    HeldLayers.of(model)  # a wrong argument is an error of this line and not of a thread's
    future: Future[int] = Future()
    future.add_done_callback(callback or _log_failure)
    work = partial(_upgrade, model, source, bit_width, future, options)
    Thread(target=_fulfil, args=(future, work), name="plyweight-upgrade", daemon=True).start()
    return future


def downgrade(model: nn.Module, bit_width: int) -> None:
    """Let ``model`` compute at ``bit_width`` and give back the memory of the planes above.

    The calls of other threads that are under way end at the bit-width they began with; the memory
    is free when this returns. An upgrade that is being read in another thread takes place
    afterwards all the same, unless its future is cancelled.

    Raises:
        BitWidthError: If that bit-width is not held.
        LayeringError: If the model was not loaded in packed form, or this thread holds a lease
            of it.
    """
    loaded = HeldLayers.of(model)
    change(loaded.model, partial(loaded.shrink, bit_width))


class _CancelledError(Exception):
    """The future of an upgrade was cancelled, and whoever waits for it knows."""


@torch.inference_mode(False)
def _upgrade(
    model: nn.Module,
    source: Address,
    bit_width: int | None,
    future: Future[int],
    options: FetchOptions,
) -> int:
    """:func:`upgrade`, unless ``future`` is cancelled; the bit-width."""
    loaded = HeldLayers.of(model)
    require_no_lease(loaded.model)  # before anything is read
    reader, target = opened_at(source, bit_width, options, known=loaded.header.artifact_id)
    if reader.header.artifact_id != loaded.header.artifact_id:
        raise ArtifactError(
            f"{reader.source.name} is artifact {reader.header.artifact_id[:12]}, but the model was "
            f"loaded from {loaded.header.artifact_id[:12]}; load the other one anew instead."
        )
    num_layers = loaded.header.layer_index(target) + 1
    layers: dict[int, ReadyLayer] = {}
    grow = partial(loaded.grow, layers, target, partial(_begin, future))
    while True:
        for index in range(loaded.num_layers, num_layers):
            if future.cancelled():
                _begin(future)
            if index not in layers:
                layers[index] = loaded.ready(index, reader.read_layer(index))
        # Downgraded meanwhile, the model lacks more. Nothing is read twice, so this comes to an
        # end, whatever the others do.
        if change(loaded.model, grow):
            return target


def _begin(future: Future[int]) -> None:
    """Go on to what cannot be cancelled any more."""
    if not future.set_running_or_notify_cancel():
        raise _CancelledError


def _fulfil(future: Future[int], work: Callable[[], int]) -> None:
    """Let ``future`` have what comes of ``work``."""
    try:
        bit_width = work()
    except _CancelledError:
        pass
    except BaseException as error:
        _forget_locals(error)
        if future.running() or future.set_running_or_notify_cancel():
            future.set_exception(error)
        del future, work  # for the error remembers this frame too
    else:
        future.set_result(bit_width)


def _forget_locals(error: BaseException | None) -> None:
    """A future may be kept long; the layers that were read are not to be kept with its error."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _log_failure(future: Future[int]) -> None:
    if not future.cancelled() and (error := future.exception()) is not None:
        logging.getLogger("plyweight").error("an upgrade in the background failed: %s", error)
