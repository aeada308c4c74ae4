"""A stand-in for the Hugging Face hub on this machine: as much of its HTTP interface as its clients need to read.

    with HubServer() as hub:
        commit = hub.add("acme/model", {"config.json": b"{}"})
        ...                                             # clients with HF_ENDPOINT=hub.url
        assert hub.asked_for("acme/model") == {"config.json"}

Served are, for models and data sets: a repository's info, its tree, `paths-info`, and its files by
HEAD and GET, with ranges. Files of the types in `LFS` are reported as the hub reports files in LFS.
Refusals carry the `X-Error-Code` by which the clients distinguish them.

How an answer goes wrong is a function from the right `Response` to the one that is sent:

    hub.misbehave("acme/model", "config.json", breaking_off(10), times=2)
"""

import hashlib
import json
import os
import socket
import struct
import termios
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fcntl import ioctl
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS = (".safetensors", ".bin", ".ckpt", ".parquet", ".png", ".zip", ".tar")
INFO, TREE = "/", "/tree"
"""What of a repository can go wrong beside its files: the API's answers to what it is, and to what it holds."""


@dataclass(frozen=True)
class Response:
    """What is sent, and how much of the body, if not all, before the connection ends."""

    status: int
    headers: dict[str, str]
    body: bytes
    num_sent: int | None = None
    reset: bool = False
    wait: threading.Event | None = None


Fault = Callable[[Response], Response]


def flipped(answer: Response) -> Response:
    """One bit of the body is wrong."""
    middle = len(answer.body) // 2
    return replace(answer, body=answer.body[:middle] + bytes([answer.body[middle] ^ 1]) + answer.body[middle + 1 :])


def replaced(body: bytes, **headers: str) -> Fault:
    """All is well but the body, which is another, with a `Content-Length` of its own."""
    return lambda answer: replace(answer, body=body, headers={**answer.headers, **headers})


def edited(**changes: object) -> Fault:
    """A JSON object with other values."""
    return lambda answer: replace(answer, body=_json({**json.loads(answer.body), **changes}))


def refused(status: int, message: str = "", **headers: str) -> Fault:
    """Another status; an underscore in a header's name stands for a hyphen."""
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda answer: Response(status, {"X-Error-Message": message, **headers}, b"")


def breaking_off(num_bytes: int) -> Fault:
    """The connection is closed after so many bytes of the body."""
    return lambda answer: replace(answer, num_sent=num_bytes)


def reset(num_bytes: int | None = None) -> Fault:
    """The connection is reset: after so many bytes of the body, or before any answer."""
    return lambda answer: replace(answer, num_sent=-1 if num_bytes is None else num_bytes, reset=True)


def stalled(until: threading.Event) -> Fault:
    """No answer comes."""
    return lambda answer: replace(answer, wait=until)


@dataclass
class _Repo:
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    broken: bool = False
    faults: dict[tuple[str, str], list] = field(default_factory=lambda: defaultdict(list))


class _Refusal(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, code: str | None, message: str) -> None:
        self.status, self.code, self.message = status, code, message


class HubServer:
    """Repositories in memory, served on a free port of 127.0.0.1 by a thread."""

    def __init__(self) -> None:
        self._repos: dict[tuple[str, str], _Repo] = {}
        self._asked_for: list[tuple[str, str]] = []
        self._ranges: list[tuple[str, str]] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(
        self,
        name: str,
        files: dict[str, bytes],
        *,
        kind: str = "models",
        tag: str | None = None,
        gated: bool = False,
        broken: bool = False,
    ) -> str:
        """Commit `files` as the whole of `name`'s branch main, and return the commit's hash.

        Args:
            kind: `models` or `datasets`.
            tag: a tag to put on the commit.
            gated: anyone may see what the repository holds, but nobody may fetch it.
            broken: the server answers every question with 500.
        """
        repo = self._repos.setdefault((kind, name), _Repo())
        repo.gated, repo.broken = gated, broken
        content = sorted((path, hashlib.sha256(data).hexdigest()) for path, data in files.items())
        commit = hashlib.sha1(json.dumps([name, len(repo.commits), content]).encode()).hexdigest()
        repo.commits[commit] = dict(files)
        repo.refs["main"] = commit
        if tag is not None:
            repo.refs[tag] = commit
        return commit

    def asked_for(self, name: str) -> set[str]:
        """The files of a repository that any client has asked for, by HEAD or GET."""
        return {path for repo, path in self._asked_for if repo == name}

    def misbehave(self, name: str, what: str, fault: Fault, *, times: int = 10**9, method: str = "GET") -> None:
        """Have the next `times` answers about `what` of a repository go wrong, after those arranged before.

        Args:
            what: a file's path, `INFO` or `TREE`.
        """
        (repo,) = (repo for (_, other), repo in self._repos.items() if other == name)
        repo.faults[method, what].append([times, fault])

    def ranges(self, path: str) -> list[str]:
        """The ranges in which a file was fetched, in order; empty for the whole."""
        return [wanted for asked, wanted in self._ranges if asked == path]

    def respond(self, method: str, url: str, wanted: str, form: dict[str, list[str]]) -> Response:
        """The answer to a request, right or as arranged, with the range `wanted` of its body."""
        path, query = urlsplit(url).path, parse_qs(urlsplit(url).query)
        try:
            headers, body = self.answer(path, query, form)
            answer = Response(200, headers, body)
        except _Refusal as fault:
            headers = {"X-Error-Message": fault.message, **({"X-Error-Code": fault.code} if fault.code else {})}
            answer = Response(fault.status, headers, _json({"error": fault.message}))
        kind, name, is_api, (verb, _, *rest) = _parse(path)
        what = {"": INFO, "revision": INFO, "tree": TREE}.get(verb, "") if is_api else "/".join(rest).rstrip("/")
        repo = self._repos.get((kind, name))
        pending = repo.faults[method, what] if repo else []
        if pending:
            pending[0][0] -= 1
            answer = pending[0][1](answer)
            if pending[0][0] == 0:
                pending.pop(0)
        if method == "GET" and not is_api:
            self._ranges.append((what, wanted))
        if answer.status == 200 and wanted:
            first, _, last = wanted.partition("-")
            size = len(answer.body)
            start, end = int(first), min(int(last) + 1 if last else size, size)
            headers = {**answer.headers, "Content-Range": f"bytes {start}-{end - 1}/{size}"}
            answer = replace(answer, status=206, headers=headers, body=answer.body[start:end])
        return answer

    def answer(self, path: str, query: dict[str, list[str]], form: dict[str, list[str]]) -> tuple[dict, bytes]:
        """Headers and body of the answer to a path like `/api/models/acme/model/tree/main`.

        Raises:
            _Refusal: the answer isn't 200.
        """
        kind, name, is_api, (verb, revision, *rest) = _parse(path)
        repo, rest = self._repos.get((kind, name)), [part for part in rest if part]
        if repo is None:  # the hub answers strangers 401, so that they can't find out which private repositories exist
            raise _Refusal(401, "RepoNotFound", "Repository not found")
        if repo.broken:
            raise _Refusal(500, None, "Internal Error - We're working hard to fix this as soon as possible!")
        commit = repo.refs.get(revision or "main", revision)
        if commit not in repo.commits:
            raise _Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files, inside = repo.commits[commit], "/".join(rest)
        if not is_api and verb == "resolve":
            self._asked_for.append((name, inside))
            if repo.gated:
                raise _Refusal(403, "GatedRepo", f"Access to {kind[:-1]} {name} is restricted")
            if inside not in files:
                raise _Refusal(404, "EntryNotFound", "Entry not found")
            entry = _entry(inside, files)
            etag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
            return {"X-Repo-Commit": commit, "ETag": f'"{etag}"'}, files[inside]
        if is_api and verb in ("", "revision"):
            siblings = [{"rfilename": path} for path in files]
            info = {"id": name, "sha": commit, "gated": repo.gated, "private": False, "siblings": siblings}
            return {}, _json({**info, "cardData": _card(files)})
        if is_api and verb == "paths-info":
            return {}, _json([_entry(path, files) for path in form["paths"] if path in _tree(files)])
        if is_api and verb == "tree":
            below = [path for path in _tree(files) if path.startswith(f"{inside}/" if inside else "")]
            if not below:
                raise _Refusal(404, "EntryNotFound", f"{inside} does not exist on {revision}")
            if query.get("recursive", ["false"])[0].lower() != "true":
                below = [path for path in below if path.count("/") == len(rest)]
            return {}, _json([_entry(path, files) for path in below])
        raise _Refusal(404, None, f"this stand-in for the hub doesn't serve {path}")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms for the other side to acknowledge its headers
    hub: HubServer

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve(parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode()))

    def _serve(self, form: dict[str, list[str]] | None = None) -> None:
        wanted = self.headers.get("Range", "").removeprefix("bytes=")
        answer = self.hub.respond(self.command, self.path, wanted, form or {})
        if answer.wait is not None:
            answer.wait.wait()
            self.close_connection = True
            return
        if answer.num_sent != -1:
            self.send_response(answer.status)
            for key, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.body[: answer.num_sent])
        if answer.num_sent is not None:
            self.close_connection = True
        if answer.reset:
            self._reset()

    def _reset(self) -> None:
        """Send RST instead of FIN, once the other side has all that was written."""
        for _ in range(10_000):
            if not struct.unpack("i", ioctl(self.connection, termios.TIOCOUTQ, bytes(4)))[0]:
                break
            time.sleep(0.001)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output clean."""


def _parse(path: str) -> tuple[str, str, bool, list[str]]:
    """Kind and name of a repository, whether the API is asked, and the rest: a verb, a revision, a path's parts."""
    parts = [unquote(part) for part in path.strip("/").split("/")]
    is_api = parts[0] == "api"
    parts = parts[1:] if is_api else parts
    kind = parts.pop(0) if parts[0] in ("models", "datasets") else "models"
    return kind, "/".join(parts[:2]), is_api, [*parts[2:], "", ""]


def _card(files: dict[str, bytes]) -> dict | None:
    """The YAML at the head of README.md."""
    _, *head = files.get("README.md", b"").decode().split("---\n", 2)
    return yaml.safe_load(head[0]) if head else None


def _tree(files: dict[str, bytes]) -> list[str]:
    """All paths of a commit: its files and the folders above them."""
    folders = {path.rsplit("/", cut)[0] for path in files for cut in range(1, path.count("/") + 1)}
    return sorted({*files, *folders})


def _entry(path: str, files: dict[str, bytes]) -> dict:
    if path not in files:
        return {"type": "directory", "oid": _oid(path.encode()), "size": 0, "path": path}
    data = files[path]
    if not path.endswith(LFS):
        return {"type": "file", "oid": _oid(data), "size": len(data), "path": path}
    sha256, text = hashlib.sha256(data).hexdigest(), lfs_pointer(data)
    lfs = {"oid": sha256, "size": len(data), "pointerSize": len(text)}
    return {"type": "file", "oid": _oid(text), "size": len(data), "path": path, "lfs": lfs}


def lfs_pointer(data: bytes) -> bytes:
    """What git holds of a file that is in LFS."""
    sha256 = hashlib.sha256(data).hexdigest()
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(data)}\n".encode()


def _oid(data: bytes) -> str:
    """The hash that git gives a file."""
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


def _json(tree: object) -> bytes:
    return json.dumps(tree).encode()
