"""open: an artifact, near or far, becomes an engine."""

from collections.abc import Sequence
from typing import Unpack

from plyweight.artifact import ArtifactReader
from plyweight.delivery import FetchOptions
from plyweight.delivery.reading import Address, opened_at, without_limits
from plyweight.engine.backends import check_options
from plyweight.engine.engine import Engine
from plyweight.engine.session import Provider, SessionOptions
from plyweight.errors import EngineError

__all__ = ["WARM_BYTES", "open"]

WARM_BYTES = 128 * 2**20  # five widths of a ResNet-18 beside the current one


def open(
    source: Address,
    *,
    bit_width: int | None = None,
    providers: Sequence[Provider] | None = None,
    threads: int | None = None,
    warm_bytes: int = WARM_BYTES,
    backend: str = "onnxruntime",
    **options: Unpack[FetchOptions],
) -> Engine:
    """An engine that computes what the artifact's model computes, without torch.

    Reads the header and the layers up to ``bit_width``, each verified before it is used.

        with plyweight.open("net.layered.safetensors", bit_width=4, threads=2) as engine:
            logits = engine.run({"input": images})["logits"]

    Args:
        source: a URL, of which what is missing is fetched into the cache; or a file, whole or cut
            at the end of a layer.
        bit_width: the widest to hold, and the one to compute at; None for all that is there.
        providers: of ONNX Runtime, the preferred one first, each a name or a name and its
            options; None for the CPU. OpenVINO has none.
        threads: that one request is spread over; None for as many as the runtime chooses. Where
            bit-widths alternate, give half of the cores or fewer: for some 40 ms after a request
            ONNX Runtime's threads spin, each width's its own.
        warm_bytes: that bit-widths used before may take beside the current one, so that to switch
            back to them takes no time; 0 keeps none.
        backend: the runtime, "onnxruntime" or "openvino".
        options: of :func:`plyweight.fetch`: limits in place of ``bit_width``, whom to believe, how
            to fetch. For a file: ``max_bytes``, ``max_ram`` and ``artifact_id``.

    Raises:
        GraphError: If the artifact has no graph, or one that cannot be computed here.
        EngineError: If a provider or backend is not there, or an argument is wrong.
        BitWidthError: If that bit-width is not stored, or the file is cut before it.
        ArtifactError: If the file is damaged; the message names layer and tensor.
        TrustError: If the artifact is not the one that is trusted.
        DeliveryError: If it cannot be read or does not arrive, or not even the base layer fits.
        ImportError: If the runtime is not installed.
    """
    if type(warm_bytes) is not int or warm_bytes < 0:
        raise EngineError(f"warm_bytes is {warm_bytes!r}; give an integer of 0 or more.")
    settings = SessionOptions(providers, threads)
    check_options(backend, settings)
    reader, target = opened_at(source, bit_width, options)
    artifact_id = reader.header.artifact_id

    def reopen(bit_width: int | None) -> tuple[ArtifactReader, int]:
        limits = options if bit_width is None else without_limits(options)
        return opened_at(source, bit_width, limits, known=artifact_id)

    return Engine(
        reader,
        target,
        reopen=reopen,
        backend=backend,
        options=settings,
        warm_bytes=warm_bytes,
    )
