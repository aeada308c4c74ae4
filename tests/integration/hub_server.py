"""A stand-in for the Hugging Face hub on this machine: as much of its HTTP interface as its clients need to read.

    with HubServer() as hub:
        commit = hub.add("acme/model", {"config.json": b"{}"})
        ...                                             # clients with HF_ENDPOINT=hub.url
        assert hub.asked_for("acme/model") == {"config.json"}

Served are, for models and data sets: a repository's info, its tree, `paths-info`, and its files by
HEAD and GET, with ranges. Faults carry the `X-Error-Code` by which the clients tell them apart.
"""

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class _Repo:
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    broken: bool = False


class _Fault(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, code: str | None, message: str) -> None:
        self.status, self.code, self.message = status, code, message


class HubServer:
    """Repositories in memory, served on a free port of 127.0.0.1 by a thread."""

    def __init__(self) -> None:
        self._repos: dict[tuple[str, str], _Repo] = {}
        self._asked_for: list[tuple[str, str]] = []
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

    def answer(self, path: str, query: dict[str, list[str]], form: dict[str, list[str]]) -> tuple[dict, bytes]:
        """Headers and body of the answer to a path like `/api/models/acme/model/tree/main`.

        Raises:
            _Fault: the answer isn't 200.
        """
        parts = [unquote(part) for part in path.strip("/").split("/")]
        is_api = parts[0] == "api"
        parts = parts[1:] if is_api else parts
        kind = parts.pop(0) if parts[0] in ("models", "datasets") else "models"
        name, (verb, revision, *rest) = "/".join(parts[:2]), [*parts[2:], "", ""]
        repo, rest = self._repos.get((kind, name)), [part for part in rest if part]
        if repo is None:  # the hub tells strangers 401, lest they learn which private repositories exist
            raise _Fault(401, "RepoNotFound", "Repository not found")
        if repo.broken:
            raise _Fault(500, None, "Internal Error - We're working hard to fix this as soon as possible!")
        commit = repo.refs.get(revision or "main", revision)
        if commit not in repo.commits:
            raise _Fault(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files, inside = repo.commits[commit], "/".join(rest)
        if not is_api and verb == "resolve":
            self._asked_for.append((name, inside))
            if repo.gated:
                raise _Fault(403, "GatedRepo", f"Access to {kind[:-1]} {name} is restricted")
            if inside not in files:
                raise _Fault(404, "EntryNotFound", "Entry not found")
            return {"X-Repo-Commit": commit, "ETag": f'"{_oid(files[inside])}"'}, files[inside]
        if is_api and verb in ("", "revision"):
            siblings = [{"rfilename": path} for path in files]
            return {}, _json({"id": name, "sha": commit, "gated": repo.gated, "private": False, "siblings": siblings})
        if is_api and verb == "paths-info":
            return {}, _json([_entry(path, files) for path in form["paths"] if path in _tree(files)])
        if is_api and verb == "tree":
            below = [path for path in _tree(files) if path.startswith(f"{inside}/" if inside else "")]
            if not below:
                raise _Fault(404, "EntryNotFound", f"{inside} does not exist on {revision}")
            if query.get("recursive", ["false"])[0].lower() != "true":
                below = [path for path in below if path.count("/") == len(rest)]
            return {}, _json([_entry(path, files) for path in below])
        raise _Fault(404, None, f"this stand-in for the hub doesn't serve {path}")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve(parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode()))

    def _serve(self, form: dict[str, list[str]] | None = None) -> None:
        url, status = urlsplit(self.path), 200
        try:
            headers, body = self.hub.answer(url.path, parse_qs(url.query), form or {})
        except _Fault as fault:
            status, headers, body = fault.status, {"X-Error-Message": fault.message}, _json({"error": fault.message})
            if fault.code is not None:
                headers["X-Error-Code"] = fault.code
        wanted = self.headers.get("Range", "").removeprefix("bytes=")
        if status == 200 and wanted:
            first, _, last = wanted.partition("-")
            start, end = int(first), min(int(last) + 1 if last else len(body), len(body))
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(body)}"
            status, body = 206, body[start:end]
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output clean."""


def _tree(files: dict[str, bytes]) -> list[str]:
    """All paths of a commit: its files and the folders above them."""
    folders = {path.rsplit("/", cut)[0] for path in files for cut in range(1, path.count("/") + 1)}
    return sorted({*files, *folders})


def _entry(path: str, files: dict[str, bytes]) -> dict:
    if path not in files:
        return {"type": "directory", "oid": _oid(path.encode()), "size": 0, "path": path}
    return {"type": "file", "oid": _oid(files[path]), "size": len(files[path]), "path": path}


def _oid(data: bytes) -> str:
    """The hash that git gives a file."""
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


def _json(tree: object) -> bytes:
    return json.dumps(tree).encode()
