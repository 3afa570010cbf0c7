"""Two local Hugging Face Hubs: one for downloads, with faults, and one for uploads.

They answer the requests of the official client and log them.
"""

import base64
import fnmatch
import hashlib
import json
import re
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

from kit.servers import Loopback, QuietHandler, Served

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_BLOCK = 1 << 14
_LARGE = (".safetensors", ".pt", ".pkl")


@dataclass
class Faults:
    """Faults of the hub. Patterns match file paths; `times` is per file, 0 means always."""

    fail_first: int = 0
    status: int = 503
    truncate: str = ""
    corrupt: str = ""
    times: int = 1
    latency_seconds: float = 0.0
    block_seconds: float = 0.0
    """Pause after each 16 kB of a file."""
    redirect: bool = False
    """Send files through a redirect to another host name."""
    denied: str = ""
    """Paths that are answered with 403."""


@dataclass
class Repository:
    """Files of a repository by path."""

    files: dict[str, bytes]
    commit: str = COMMIT
    lfs: tuple[str, ...] = (".parquet", ".zip", ".safetensors")


@dataclass
class Request:
    """One line of the log."""

    method: str
    path: str
    range: str | None
    token: str | None
    host: str
    status: int = 0
    sent: int = 0


@dataclass
class LoopbackHub(Served):
    """The server, as a context manager. `repositories` maps ("dataset", "org/name") to files; all may be changed."""

    repositories: dict[tuple[str, str], Repository] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    """Files under /files/."""
    faults: Faults = field(default_factory=Faults)
    log: list[Request] = field(default_factory=list)

    def __enter__(self) -> Self:
        class Handler(_Downloads):
            hub = self

        self.server = Loopback(Handler)
        self.lock, self.done = threading.Lock(), Counter[tuple[str, str]]()
        return super().__enter__()

    def add(self, name: str, files: dict[str, bytes], kind: str = "dataset", **more: Any) -> Repository:
        """Add a repository."""
        self.repositories[kind, name] = Repository(files, **more)
        return self.repositories[kind, name]

    def requests(self, part: str) -> list[Request]:
        """Return the requests for files whose path ends with `part`."""
        return [each for each in self.log if each.path.endswith(part) and "/api/" not in each.path]

    def sent(self, part: str = "") -> int:
        """Return the bytes of files that were sent."""
        return sum(each.sent for each in self.requests(part))

    def take(self, fault: str, path: str) -> bool:
        """Return whether this answer has the fault, and count it."""
        pattern = getattr(self.faults, fault)
        if not pattern or not fnmatch.fnmatchcase(path, pattern):
            return False
        with self.lock:
            self.done[fault, path] += 1
            return not self.faults.times or self.done[fault, path] <= self.faults.times


class _Answering(QuietHandler):
    """What both hubs answer with."""

    def begin(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def say(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        facts = {"Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})}
        self.begin(status, facts)
        if self.command != "HEAD":
            self.wfile.write(body)


class _Downloads(_Answering):
    hub: LoopbackHub

    def begin(self, status: int, headers: dict[str, str]) -> None:
        self.entry.status = status
        super().begin(status, headers)

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        entry = Request(self.command, path, self.headers.get("Range"), token, self.headers.get("Host", ""))
        self.entry = entry
        self.hub.log.append(entry)
        time.sleep(self.hub.faults.latency_seconds)
        with self.hub.lock:
            fails = self.hub.faults.fail_first > 0
            self.hub.faults.fail_first -= fails
        if fails:
            self.say({"error": "injected"}, self.hub.faults.status)
            return
        try:
            self.route(path)
        except KeyError as error:
            self.say({"error": str(error)}, 404, {"X-Error-Code": "EntryNotFound"})
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_HEAD = do_GET

    def route(self, path: str) -> None:
        parts = path.strip("/").split("/")
        if parts[0] == "files":
            name = "/".join(parts[1:])
            self.say_file(name, self.hub.files[name], hashlib.sha256(self.hub.files[name]).hexdigest())
        elif parts[0] == "api":
            self.say_api(parts[1:])
        else:
            kind = "dataset" if parts[0] == "datasets" else "model"
            parts = parts[1:] if kind == "dataset" else parts
            repository = self.hub.repositories[kind, "/".join(parts[:2])]
            name = "/".join(parts[4:])
            content = repository.files[name]
            if parts[3] not in (repository.commit, "main"):
                raise KeyError(parts[3])
            if fnmatch.fnmatchcase(name, self.hub.faults.denied):
                self.say({"error": "gated"}, 403, {"X-Error-Message": "you are not in the authorized list"})
                return
            if self.hub.faults.redirect and self.entry.host.startswith("127."):
                port = self.hub.server.server_address[1]
                headers = {"Location": f"http://localhost:{port}{self.path}", **self.facts(repository, name)}
                self.begin(302, {**headers, "Content-Length": "0"})
                return
            self.say_file(name, content, self.etag(repository, name), self.facts(repository, name))

    def etag(self, repository: Repository, name: str) -> str:
        content = repository.files[name]
        return hashlib.sha256(content).hexdigest() if name.endswith(repository.lfs) else git_id(content)

    def facts(self, repository: Repository, name: str) -> dict[str, str]:
        facts = {"X-Repo-Commit": repository.commit, "ETag": f'"{self.etag(repository, name)}"'}
        if name.endswith(repository.lfs):
            facts |= {"X-Linked-Etag": facts["ETag"], "X-Linked-Size": str(len(repository.files[name]))}
        return facts

    def say_api(self, parts: list[str]) -> None:
        kind, name, verb = parts[0][:-1], "/".join(parts[1:3]), parts[3] if len(parts) > 3 else "revision"
        if (kind, name) not in self.hub.repositories:
            self.say({"error": "no such repository"}, 401, {"X-Error-Code": "RepoNotFound"})
            return
        repository = self.hub.repositories[kind, name]
        revision = "/".join(parts[4:]) or "main"
        if revision not in ("main", repository.commit):
            self.say({"error": "no such revision"}, 404, {"X-Error-Code": "RevisionNotFound"})
        elif verb == "revision":
            names = [{"rfilename": path} for path in sorted(repository.files)]
            self.say({"_id": "0", "id": name, "sha": repository.commit, "siblings": names, "private": False,
                           "tags": [], "downloads": 0, "likes": 0})  # fmt: skip
        else:
            entries = []
            for path, content in sorted(repository.files.items()):
                entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git_id(content)}
                if path.endswith(repository.lfs):
                    sha256 = hashlib.sha256(content).hexdigest()
                    entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 130}
                entries.append(entry)
            self.say(entries)

    def say_file(self, name: str, content: bytes, etag: str, headers: dict[str, str] | None = None) -> None:
        first, status = 0, 200
        wanted = self.headers.get("Range")
        if wanted and self.headers.get("If-Range") in (None, f'"{etag}"'):
            first, status = int(wanted.removeprefix("bytes=").partition("-")[0]), 206
            if first >= len(content):
                self.begin(416, {"Content-Length": "0", "Content-Range": f"bytes */{len(content)}"})
                return
        facts = {"ETag": f'"{etag}"', "Content-Length": str(len(content) - first), **(headers or {})}
        if status == 206:
            facts["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        self.begin(status, facts)
        if self.command == "HEAD":
            return
        flip = len(content) // 2
        if first <= flip and self.hub.take("corrupt", name):
            content = content[:flip] + bytes([content[flip] ^ 0xFF]) + content[flip + 1 :]
        stop = len(content)
        if len(content) - first > 1 and self.hub.take("truncate", name):
            stop, self.close_connection = first + (len(content) - first) // 2, True
        for start in range(first, stop, _BLOCK):
            block = content[start : min(stop, start + _BLOCK)]
            self.entry.sent += len(block)
            self.wfile.write(block)
            time.sleep(self.hub.faults.block_seconds)


def git_id(content: bytes) -> str:
    """Return git's id of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@dataclass
class Uploaded:
    """Contents and visibility of a repository."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)

    def entry(self, path: str) -> dict[str, Any] | None:
        """Return a tree's entry of a file or folder, or None."""
        content = self.files.get(path)
        if content is not None:
            return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        if any(each.startswith(f"{path}/") for each in self.files):
            return {"type": "directory", "path": path, "oid": "0" * 40}
        return None


@dataclass
class UploadHub(Served):
    """The server, as a context manager."""

    token: str = "hf_right_token"
    fail: str = ""
    repositories: dict[str, Uploaded] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    """Large files by sha256, committed or not."""
    log: list[tuple[str, str]] = field(default_factory=list)

    def __enter__(self) -> Self:
        class Handler(_Uploads):
            hub = self

        self.server = Loopback(Handler)
        return super().__enter__()


class _Uploads(_Answering):
    hub: UploadHub

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.body()
        self.hub.log.append((self.command, path))
        if self.hub.fail and self.hub.fail in path:
            self.say({"error": "injected"}, 400)
        elif path.startswith("/put/"):
            self.put(path.removeprefix("/put/"), body)
        elif self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self.say({"error": "Invalid username or password."}, 401)
        elif "/resolve/" in path:
            self.resolve(path)
        else:
            self.route(path, body)

    do_HEAD = do_PUT = do_POST = do_GET

    def route(self, path: str, body: bytes) -> None:
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.hub.repositories.setdefault(
                name, Uploaded(asked.get("visibility") == "private" or bool(asked.get("private")))
            )
            self.say({"url": f"{self.hub.url}/{name}", "name": name})
            return
        if path == "/api/validate-yaml":
            self.say({"errors": [], "warnings": []})
            return
        parts = path.removeprefix("/api/models/").strip("/").split("/")
        name = "/".join(parts[:2]).removesuffix(".git")
        repository = self.hub.repositories.get(name)
        if repository is None:
            self.say({"error": "Uploaded not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            return
        verb = parts[2] if len(parts) > 2 else "info"
        if verb == "preupload":
            asked = json.loads(body)["files"]
            modes = [
                {"path": each["path"], "uploadMode": "lfs" if each["path"].endswith(_LARGE) else "regular",
                 "shouldIgnore": False}
                for each in asked
            ]  # fmt: skip
            self.say({"files": modes})
        elif verb == "tree":
            below = "".join(f"{part}/" for part in parts[4:])
            deep = "recursive=true" in self.path.lower() or not below
            names = {
                path if deep else below + path.removeprefix(below).split("/")[0]
                for path in repository.files
                if path.startswith(below)
            }
            if names or not below:
                self.say([repository.entry(path) for path in sorted(names)])
            else:
                self.say({"error": "not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        elif verb == "paths-info":
            asked = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode())["paths"]
            self.say([entry for path in asked if (entry := repository.entry(path)) is not None])
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**each, "actions": {"upload": {"href": f"{self.hub.url}/put/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            self.say({"transfer": "basic", "objects": objects})
        elif verb == "commit":
            self.commit(name, repository, body)
        else:
            siblings = [{"rfilename": each} for each in repository.files]
            self.say({"_id": "0", "id": name, "sha": "0" * 40, "private": repository.private, "siblings": siblings})

    def resolve(self, path: str) -> None:
        name, _, place = path.strip("/").partition("/resolve/")
        content = self.hub.repositories[name].files.get(place.partition("/")[2])
        if content is None:
            self.say({"error": "not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        part = content[int(asked[1]) : int(asked[2]) + 1 if asked[2] else None] if asked else content
        self.say(part, 206 if asked else 200)

    def put(self, sha256: str, body: bytes) -> None:
        assert hashlib.sha256(body).hexdigest() == sha256
        self.hub.stored[sha256] = body
        self.say({})

    def commit(self, name: str, repository: Uploaded, body: bytes) -> None:
        files, message = dict(repository.files), ""
        for line in body.splitlines():
            entry: dict[str, Any] = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        repository.files = files
        repository.commits.append(message)
        oid = f"{len(repository.commits):040d}"
        self.say({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{name}/commit/{oid}"})

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().strip() or b"0", 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))
