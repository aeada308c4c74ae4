"""Files from the Hugging Face hub: each one checked against the hub's hash, with retries on network faults.

    with hub.repository("base.repo", "acme/model", None, "model", instead="…") as source:
        paths = source.fetch(["unet/config.json"])

The hub reports every file's size and hash at a commit: SHA-256 for files in LFS, git's blob id for the others. A
file, just fetched or from the local cache, is used only if both match.
"""

import re
import time
from collections import Counter
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import constants, get_session, set_client_factory
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx, parse_ratelimit_headers, silent_tqdm
from huggingface_hub.utils.sha import git_hash
from tqdm import tqdm

from sdtrain.ground.errors import InputError
from sdtrain.ground.files import disk_is_full, sha256_file

if TYPE_CHECKING:
    from huggingface_hub import RepoFile

NUM_TRIES = 5
FIRST_WAIT_S = 1.0
"""Before the second try; doubles with each further one, and is longer where the hub asks for it."""
LONGEST_WAIT_S = 300.0
"""The hub's rate limits count requests in windows of five minutes."""

_NETWORK_FAULTS = (httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError)
_TRANSIENT = {408, 429, 500, 502, 503, 504}
_MANY_FILES = 16
"""For more files than this there is one progress bar for all, because one for each would only flicker."""
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_MOVED = {
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "runwayml/stable-diffusion-inpainting": "stable-diffusion-v1-5/stable-diffusion-inpainting",
    "lambdalabs/pokemon-blip-captions": "reach-vb/pokemon-blip-captions",
}


@dataclass(frozen=True)
class Repository:
    """A repository at one commit, with what the hub reports of each of its files."""

    key: str
    name: str
    kind: str
    commit: str
    files: dict[str, "RepoFile"]

    def fetch(self, names: Collection[str]) -> dict[str, Path]:
        """Fetch files, or find them in the hub's local cache; returns each one's path.

        Raises:
            InputError: a file doesn't match what the hub reports, twice in a row.
        """
        quiet = len(names) > _MANY_FILES
        get, no_bar = partial(self._get, quiet=quiet), None if quiet else True
        with ThreadPoolExecutor(8) as pool, tqdm(total=len(names), desc=self.key, unit="file", disable=no_bar) as bar:
            found = {}
            for name, result in zip(names, pool.map(get, names), strict=True):
                found[name] = result
                bar.update()
        bad = [name for name, (_, fault) in found.items() if fault is not None]
        for name in bad:  # all before the first is fetched again: the cache stores equal files once
            path, fault = found[name]
            _discard(path)
            print(f"{self._place(name)}: {fault}; discarded, fetching it again", flush=True)
        for name in bad:
            path, fault = found[name] = self._get(name)
            if fault is not None:
                _discard(path)
                raise InputError(
                    f"{self._place(name)}: {fault}, also when fetched again; it isn't kept. Check that no "
                    f"proxy or login page answers in place of {constants.ENDPOINT}, or try again later"
                )
        return {name: path for name, (path, _) in found.items()}

    def _get(self, name: str, quiet: bool = False) -> tuple[Path | None, str | None]:
        """A file's path, and what is wrong with it."""
        from huggingface_hub import hf_hub_download

        bar = silent_tqdm if quiet else None
        try:
            path = Path(hf_hub_download(self.name, name, repo_type=self.kind, revision=self.commit, tqdm_class=bar))
        except ValueError as error:
            raise InputError(f"{self._place(name)}: {error}") from None
        except (OSError, RuntimeError) as error:
            # A wrong length is a bare OSError, a fault of Xet a RuntimeError; no file is kept.
            if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
                raise
            return None, str(error).splitlines()[0]
        fault = _mismatch(path, self.files[name])
        if fault is None and is_lfs_pointer(path):
            raise InputError(
                f"{self._place(name)}: is a Git LFS pointer in the repository itself, which lacks the actual "
                "file; take another revision or repository"
            )
        return path, fault

    def _place(self, name: str) -> str:
        return f"{self.key} = {self.name!r}: {name} at commit {self.commit}"


@contextmanager
def repository(key: str, name: str, revision: str | None, kind: str, instead: str) -> Iterator[Repository]:
    """A repository at the commit of `revision`; turns hub and network faults, here and in the body, into `InputError`.

    Args:
        key: the params key that named the repository, e.g. `base.repo`.
        kind: `model` or `dataset`.
        instead: what to do where there is no network.

    Raises:
        InputError: names the params key and the way out.
    """
    _be_patient()
    with explained(key, name, revision, instead):
        found = _look_up(key, name, revision, kind)
        print(f"{key}: {name} at {revision or 'its newest revision'} is commit {found.commit}", flush=True)
        yield found


@contextmanager
def explained(key: str, name: str, revision: str | None, instead: str) -> Iterator[None]:
    """Turn faults of hub and network into `InputError`; arguments as for `repository`."""
    try:
        yield
    except (HFValidationError, HTTPError, OSError, _Unanswered) as error:
        if disk_is_full(error):
            raise
        raise InputError(f"{key} = {name!r}: {_explain(error, name, revision, instead)}") from None


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is a Git LFS pointer instead of the file itself."""
    with path.open("rb") as file:
        return file.read(len(_LFS_POINTER)) == _LFS_POINTER


def _look_up(key: str, name: str, revision: str | None, kind: str) -> Repository:
    from huggingface_hub import HfApi, RepoFile

    api = HfApi()
    try:
        commit = api.repo_info(name, repo_type=kind, revision=revision).sha
        if not isinstance(commit, str) or not re.fullmatch("[0-9a-f]{40}", commit):
            raise ValueError(f"it gives {commit!r} for a commit's hash")
        entries = api.list_repo_tree(name, repo_type=kind, revision=commit, recursive=True)
        files = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
    except HFValidationError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # what other JSON, or none, leads to
        raise InputError(
            f"{key} = {name!r}: the answer of {constants.ENDPOINT} isn't one of the hub's API "
            f"({type(error).__name__}: {error}); check that no proxy or login page answers in its place"
        ) from None
    return Repository(key, name, kind, commit, files)


def _mismatch(path: Path, listed: "RepoFile") -> str | None:
    """How a file differs from what the hub reports; None if it matches."""
    if listed.lfs is not None:
        algorithm, expected, found = "SHA-256", listed.lfs.sha256, sha256_file(path)
    else:
        algorithm, expected, found = "git blob id", listed.blob_id, git_hash(path.read_bytes())
    size = path.stat().st_size
    if (size, found) == (listed.size, expected):
        return None
    with path.open("rb") as file:
        start = file.read(200).lstrip().lower()
    looks = " (it is a Git LFS pointer)" if is_lfs_pointer(path) else ""
    looks = " (it is an HTML page)" if start.startswith((b"<!doctype html", b"<html")) else looks
    return f"has {size} bytes and {algorithm} {found}{looks}; the hub reports {listed.size} bytes and {expected}"


def _discard(path: Path | None) -> None:
    """Delete a file from the hub's local cache, where it is a link to the content."""
    if path is not None:
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)


def _explain(error: Exception, name: str, revision: str | None, instead: str) -> str:
    unreachable = f"can't reach the hub at {constants.ENDPOINT}; check the network, or {instead}"
    match error:
        case _Unanswered(reached=True):
            return f"{error} (tried {NUM_TRIES} times)"
        case _Unanswered():
            return f"{unreachable} (tried {NUM_TRIES} times: {error})"
        case HFValidationError():
            return f"not a valid name on the hub: {error}"
        case GatedRepoError():
            return "the repository is gated; accept its terms on its page, then log in with `hf auth login`"
        case RevisionNotFoundError():
            return f"has no revision {revision!r}; see its branches and commits on its page"
        case RepositoryNotFoundError():
            moved = f"it moved: use {_MOVED[name]!r}" if name in _MOVED else None
            hint = moved or "check the spelling, or log in with `hf auth login` if it is private"
            return f"the hub has no such repository; {hint}"
        case OfflineModeIsEnabled():
            return f"HF_HUB_OFFLINE is set, so the hub can't be asked; unset it, or {instead}"
        case LocalEntryNotFoundError(__cause__=HfHubHTTPError() | FileMetadataError() as cause):
            return _explain(cause, name, revision, instead)
        case LocalEntryNotFoundError():
            return unreachable
        case HfHubHTTPError() if not isinstance(error, EntryNotFoundError):
            said = error.server_message or error.response.reason_phrase
            return f"the hub answered {error.response.status_code}: {said}"
        case HTTPError() | ConnectionError() if not isinstance(error, HfHubHTTPError):
            return f"{unreachable} ({error})"
    return str(error)


class _Unanswered(Exception):
    """The hub, or the network, failed at every try.

    Neither an `OSError` nor one of the client's own errors: the libraries between here and the request would catch
    those, retry, or treat the file as absent.
    """

    def __init__(self, fault: str, reached: bool) -> None:
        super().__init__(fault)
        self.reached = reached


@cache
def _be_patient() -> None:
    """Route all of this process's requests to the hub, those of Datasets too, through `_PatientClient`."""
    hooks = get_session().event_hooks  # the hub client's own, which respect HF_HUB_OFFLINE
    set_client_factory(partial(_PatientClient, event_hooks=hooks, follow_redirects=True))


class _PatientClient(httpx.Client):
    """Retries what failed because of the network or the hub, after growing waits that it prints."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self._num_faults = Counter()
        """By URL, since it last succeeded."""

    def send(self, request: httpx.Request, *, stream: bool = False, **options) -> httpx.Response:
        if request.method == "HEAD" and not str(request.url).startswith(constants.ENDPOINT):
            return super().send(request, stream=stream, **options)  # Datasets counts downloads there: not worth a retry
        given = {key: value for key, value in request.extensions.get("timeout", {}).items() if value is not None}
        patience = httpx.Timeout(constants.HF_HUB_DOWNLOAD_TIMEOUT).as_dict()
        request.extensions["timeout"] = {**patience, **given}  # the hub's API calls have no timeout of their own
        while True:
            try:
                response = super().send(request, stream=stream, **options)
            except _NETWORK_FAULTS as error:
                self.wait_after(request, str(error) or type(error).__name__)
                continue
            if response.status_code not in _TRANSIENT:
                break
            said = response.headers.get("X-Error-Message", response.reason_phrase)
            response.close()
            fault = f"the hub answered {response.status_code}: {said}"
            self.wait_after(request, fault, at_least_s=_asked_wait(response), reached=True)
        if stream:
            response.stream = _Body(response.stream, self, request)
        else:
            self.has_come(request)
        return response

    def wait_after(self, request: httpx.Request, fault: str, at_least_s: float = 0, reached: bool = False) -> None:
        """Wait before the next try, or raise `_Unanswered` after the last."""
        url = str(request.url.copy_with(query=None))
        self._num_faults[url] += 1
        num_faults = self._num_faults[url]
        if num_faults == NUM_TRIES:
            self.has_come(request)
            raise _Unanswered(fault if reached else f"{fault}, at {url}", reached)
        wait_s = min(max(FIRST_WAIT_S * 2 ** (num_faults - 1), at_least_s), LONGEST_WAIT_S)
        print(f"{url}: {fault}; trying again in {wait_s:g} s ({num_faults + 1} of {NUM_TRIES})", flush=True)
        time.sleep(wait_s)

    def has_come(self, request: httpx.Request) -> None:
        self._num_faults.pop(str(request.url.copy_with(query=None)), None)


class _Body(httpx.SyncByteStream):
    """The bytes of a download; if they break off, prints that and waits.

    It then raises the one error on which `hf_hub_download` resumes; on a reset connection it would start from
    scratch.
    """

    def __init__(self, stream: httpx.SyncByteStream, client: _PatientClient, request: httpx.Request) -> None:
        self._stream, self._client, self._request = stream, client, request

    def __iter__(self) -> Iterator[bytes]:
        size = 0
        try:
            for data in self._stream:
                size += len(data)
                if size > constants.DOWNLOAD_CHUNK_SIZE:  # what `hf_hub_download` keeps
                    self._client.has_come(self._request)
                yield data
        except _NETWORK_FAULTS as error:
            self._client.wait_after(self._request, str(error) or type(error).__name__)
            raise httpx.RemoteProtocolError(str(error)) from error
        self._client.has_come(self._request)

    def close(self) -> None:
        self._stream.close()


def _asked_wait(response: httpx.Response) -> float:
    """Seconds that the hub asks us to wait."""
    limit = parse_ratelimit_headers(response.headers)
    if response.status_code == 429 and limit is not None and limit.remaining == 0:
        return limit.reset_in_seconds
    asked = response.headers.get("Retry-After", "")
    return int(asked) if asked.isdigit() else 0
