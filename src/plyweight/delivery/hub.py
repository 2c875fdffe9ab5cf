"""The Hugging Face Hub: a file of a model repository, every byte of it from one commit.

    hf://owner/repo/path/in/repo
    hf://owner/repo@v1.0/path/in/repo              a branch, tag or commit; refs/pr/7 as it is
    hf://owner/repo@feature%2Fx/path/in/repo       any other slash in a revision as %2F

huggingface_hub says which URL that is, which commit the revision means and what token to send;
:class:`plyweight.delivery.http.HttpSource` moves the bytes. A branch that moves on meanwhile
changes nothing: the commit is asked for once, before the first byte. ``HF_ENDPOINT``, ``HF_TOKEN``
and ``HF_HUB_OFFLINE`` mean what they mean to huggingface_hub.
"""

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import unquote

from plyweight.artifact import ByteRange
from plyweight.delivery.http import HttpSource, require_private
from plyweight.delivery.replies import is_transient, retry_after
from plyweight.delivery.source import RemoteSource, Reply
from plyweight.errors import SourceError, TransferError

try:
    import httpx2
    from huggingface_hub import HfApi, constants, get_token, hf_hub_url
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
except ImportError as error:
    raise ImportError(
        'reading from the Hub needs huggingface_hub; run: pip install "plyweight[hub]"'
    ) from error

__all__ = ["hub_source"]

ADDRESS = re.compile(
    r"hf://(?P<repo>[^/@]+/[^/@]+)"
    r"(?:@(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+))?"
    r"/(?P<path>[^/].*)"
)
COMMIT = re.compile(r"[0-9a-f]{40}")
RESOLVE_TIMEOUT_S = 30.0


def hub_source(address: str, *, token: str | None = None, allow_http: bool = False) -> RemoteSource:
    """The source of an ``hf://`` address; the Hub is asked when the first bytes are.

    Args:
        address: as the module says.
        token: of the Hub; by default the one that huggingface_hub has (``HF_TOKEN``, or that of
            ``hf auth login``).
        allow_http: allow an ``HF_ENDPOINT`` that is plain http on another machine; the token goes
            there in clear then.

    Raises:
        SourceError: If the address is not one of the Hub.
    """
    match = ADDRESS.fullmatch(address)
    if match is None or not {"", ".", ".."}.isdisjoint(match["path"].split("/")):
        raise SourceError(
            f"{address} is not like hf://owner/repo/path or hf://owner/repo@revision/path; "
            "check it."
        )
    revision = unquote(match["revision"] or constants.DEFAULT_REVISION)
    return _HubSource(address, match["repo"], revision, match["path"], token, allow_http)


class _HubSource:
    """A file of a repository, found when it is first asked for."""

    def __init__(
        self, name: str, repo: str, revision: str, path: str, token: str | None, allow_http: bool
    ) -> None:
        self._name, self._repo, self._revision, self._path = name, repo, revision, path
        self._token, self._allow_http = token, allow_http
        # Read now, not when huggingface_hub was imported.
        self._endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
        self._lock = threading.Lock()
        self._file: HttpSource | None = None

    @property
    def name(self) -> str:
        """The address."""
        return self._name

    @contextmanager
    def get(self, byte_range: ByteRange, *, identity: str | None = None) -> Iterator[Reply]:
        """Ask once for ``byte_range``."""
        with self._lock:
            if self._file is None:
                self._file = self._found()
            file = self._file
        with file.get(byte_range, identity=identity) as reply:
            yield reply

    def close(self) -> None:
        """Close all connections."""
        with self._lock:
            if self._file is not None:
                self._file.close()

    def _found(self) -> HttpSource:
        """The file in the commit that the revision means now."""
        # The question which commit it is has the token already.
        at = f"the Hub at {self._endpoint}"
        require_private(self._endpoint, at, allow_http=self._allow_http)
        with self._errors():
            commit = self._commit()
            url = hf_hub_url(self._repo, self._path, revision=commit, endpoint=self._endpoint)
            token = self._token
            if token is None and not constants.HF_HUB_DISABLE_IMPLICIT_TOKEN:
                token = get_token()
        return HttpSource(
            url,
            token=token,
            allow_http=self._allow_http,
            name=self.name,
        )

    def _commit(self) -> str:
        if COMMIT.fullmatch(self._revision):
            return self._revision
        api = HfApi(endpoint=self._endpoint, token=self._token)
        info = api.model_info(
            self._repo, revision=self._revision, timeout=RESOLVE_TIMEOUT_S, expand=["sha"]
        )
        if not COMMIT.fullmatch(info.sha or ""):
            raise TransferError(
                f"{self._endpoint} does not say which commit {self._revision!r} of {self._repo} "
                "is; try again."
            )
        return str(info.sha)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Errors of huggingface_hub as ours."""
        at = self._endpoint
        try:
            yield
        except RevisionNotFoundError as error:
            raise SourceError(
                f"{self._repo} has no revision {self._revision!r} at {at}; check the address."
            ) from error
        except RepositoryNotFoundError as error:  # gated ones too
            raise SourceError(
                f"{at} shows no repository {self._repo}; check the address, and if it is private "
                "or gated give a token that may read it (HF_TOKEN, or `hf auth login`)."
            ) from error
        except OfflineModeIsEnabled as error:
            raise SourceError(
                f"{self.name} is on the Hub, but HF_HUB_OFFLINE is set; unset it."
            ) from error
        except HfHubHTTPError as error:
            status = error.response.status_code
            if is_transient(status):
                raise TransferError(
                    f"{at} answered {status} for {self.name}; try again.",
                    retry_after_s=retry_after(error.response),
                ) from error
            raise SourceError(
                f"{at} answered {status} for {self.name}; check the address and the token."
            ) from error
        except HFValidationError as error:
            raise SourceError(
                f"{self.name} does not name a repository of the Hub; check its spelling."
            ) from error
        except httpx2.HTTPError as error:
            raise TransferError(f"{at} cannot be reached ({error}); try again.") from error
        except (ValueError, LookupError, TypeError, AttributeError) as error:  # not the JSON it was
            raise TransferError(f"{at} answered nonsense for {self.name}; try again.") from error
