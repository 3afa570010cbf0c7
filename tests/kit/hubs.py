"""A local Hugging Face Hub: it answers the requests of the official client for downloads, with faults, and uploads."""

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


@dataclass
class Faults:
    """Faults of the hub. Patterns match file paths; `times` is per file, 0 means always."""

    fail_first: int = 0
    status: int = 503
    truncate: str = ""
    corrupt: str = ""
    times: int = 1
    block_seconds: float = 0.0
    """Pause after each 16 kB of a file."""
    denied: str = ""
    """Paths that are answered with 403."""
    broken: str = ""
    """A part of the addresses that are answered with 400."""


@dataclass
class Repository:
    """Contents and visibility of a repository."""

    files: dict[str, bytes] = field(default_factory=dict)
    commit: str = COMMIT
    lfs: tuple[str, ...] = (".parquet", ".zip", ".safetensors", ".pt", ".pkl")
    kind: str = "dataset"
    private: bool = False
    commits: list[str] = field(default_factory=list)
    """The messages of what was pushed."""

    def sha256(self, path: str) -> str:
        return hashlib.sha256(self.files[path]).hexdigest()

    def entry(self, path: str) -> dict[str, Any] | None:
        """Return a tree's entry of a file or folder, or None."""
        if path not in self.files:
            below = any(each.startswith(f"{path}/") for each in self.files)
            return {"type": "directory", "path": path, "oid": "0" * 40} if below else None
        size = len(self.files[path])
        entry = {"type": "file", "path": path, "size": size, "oid": git_id(self.files[path])}
        large = {"lfs": {"oid": self.sha256(path), "size": size, "pointerSize": 130}}
        return entry | (large if path.endswith(self.lfs) else {})

    def tree(self, folder: str, deep: bool) -> list[dict[str, Any] | None]:
        """Return the entries of a folder, or of all below it."""
        below = f"{folder}/" if folder else ""
        paths = [path for path in self.files if path.startswith(below)]
        found = set(paths) if deep else {below + path.removeprefix(below).split("/")[0] for path in paths}
        return [self.entry(path) for path in sorted(found)]


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
    """The server, as a context manager. All may be changed while it runs."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    """Files under /files/."""
    token: str | None = None
    """What every request must have; None: nothing."""
    faults: Faults = field(default_factory=Faults)
    stored: dict[str, bytes] = field(default_factory=dict)
    """Large files that were uploaded, by sha256, committed or not."""
    log: list[Request] = field(default_factory=list)

    def __enter__(self) -> Self:
        class Handler(_Handler):
            hub = self

        self.server = Loopback(Handler)
        self.lock, self.done = threading.Lock(), Counter[tuple[str, str]]()
        return super().__enter__()

    def add(self, name: str, files: dict[str, bytes], **more: Any) -> Repository:
        self.repositories[name] = Repository(files, **more)
        return self.repositories[name]

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


class _Handler(QuietHandler):
    hub: LoopbackHub

    def begin(self, status: int, headers: dict[str, str]) -> None:
        self.entry.status = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def say(self, value: Any, status: int = 200, **headers: str) -> None:
        body = json.dumps(value).encode()
        facts = {name.replace("_", "-"): text for name, text in headers.items()}
        self.begin(status, {"Content-Type": "application/json", "Content-Length": str(len(body)), **facts})
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().strip() or b"0", 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_GET(self) -> None:
        path, body = unquote(urlsplit(self.path).path), self.body()
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.entry = Request(self.command, path, self.headers.get("Range"), token, self.headers.get("Host", ""))
        self.hub.log.append(self.entry)
        faults = self.hub.faults
        with self.hub.lock:
            fails = faults.fail_first > 0
            faults.fail_first -= fails
        parts = path.strip("/").split("/")
        try:
            if fails:
                self.say({"error": "injected"}, faults.status)
            elif faults.broken and faults.broken in path:
                self.say({"error": "injected"}, 400)
            elif parts[0] == "put":
                assert hashlib.sha256(body).hexdigest() == parts[1]
                self.hub.stored[parts[1]] = body
                self.say({})
            elif self.hub.token not in (None, token):
                self.say({"error": "Invalid username or password."}, 401)
            elif parts[0] == "files":
                content = self.hub.files["/".join(parts[1:])]
                self.say_file("/".join(parts[1:]), content, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"'})
            elif parts[0] == "api":
                self.say_api(parts[1:], body)
            elif parts[-1] == "batch":
                objects = [
                    {**each, "actions": {"upload": {"href": f"{self.hub.url}/put/{each['oid']}"}}}
                    for each in json.loads(body)["objects"]
                ]
                self.say({"transfer": "basic", "objects": objects})
            else:
                self.resolve(parts[1:] if parts[0] == "datasets" else parts)
        except KeyError as error:
            self.say({"error": str(error)}, 404, X_Error_Code="EntryNotFound")
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_HEAD = do_PUT = do_POST = do_GET

    def resolve(self, parts: list[str]) -> None:
        """Answer a request for NAME/resolve/REVISION/PATH."""
        repository, name, faults = self.hub.repositories["/".join(parts[:2])], "/".join(parts[4:]), self.hub.faults
        content = repository.files[name]
        if parts[3] not in (repository.commit, "main"):
            raise KeyError(parts[3])
        etag = repository.sha256(name) if name.endswith(repository.lfs) else git_id(content)
        facts = {"X-Repo-Commit": repository.commit, "ETag": f'"{etag}"'}
        if name.endswith(repository.lfs):
            facts |= {"X-Linked-Etag": facts["ETag"], "X-Linked-Size": str(len(content))}
        if fnmatch.fnmatchcase(name, faults.denied):
            self.say({"error": "gated"}, 403, X_Error_Message="you are not in the authorized list")
        else:
            self.say_file(name, content, facts)

    def say_api(self, parts: list[str], body: bytes) -> None:
        if parts == ["repos", "create"]:
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            private = asked.get("visibility") == "private" or bool(asked.get("private"))
            self.hub.repositories.setdefault(name, Repository(kind="model", private=private))
            self.say({"url": f"{self.hub.url}/{name}", "name": name})
            return
        if parts == ["validate-yaml"]:
            self.say({"errors": [], "warnings": []})
            return
        kind, name, verb = parts[0][:-1], "/".join(parts[1:3]), parts[3] if len(parts) > 3 else "revision"
        repository = self.hub.repositories.get(name)
        if repository is None or repository.kind != kind:
            self.say({"error": "no such repository"}, 404 if self.hub.token else 401, X_Error_Code="RepoNotFound")
        elif len(parts) > 4 and parts[4] not in ("main", repository.commit):
            self.say({"error": "no such revision"}, 404, X_Error_Code="RevisionNotFound")
        elif verb == "revision":
            names = [{"rfilename": path} for path in sorted(repository.files)]
            self.say({"_id": "0", "id": name, "sha": repository.commit, "siblings": names,
                      "private": repository.private, "tags": [], "downloads": 0, "likes": 0})  # fmt: skip
        elif verb == "tree":
            folder = "/".join(parts[5:])
            if (found := repository.tree(folder, "recursive=true" in self.path.lower() or not folder)) or not folder:
                self.say(found)
            else:
                raise KeyError(folder)
        elif verb == "paths-info":
            paths = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode())["paths"]
            self.say([entry for path in paths if (entry := repository.entry(path)) is not None])
        elif verb == "preupload":
            modes = {path: "lfs" if path.endswith(repository.lfs) else "regular"
                     for path in (each["path"] for each in json.loads(body)["files"])}  # fmt: skip
            self.say({"files": [{"path": path, "uploadMode": modes[path], "shouldIgnore": False} for path in modes]})
        else:
            self.commit(name, repository, body)

    def say_file(self, name: str, content: bytes, facts: dict[str, str]) -> None:
        first, last, status = 0, len(content) - 1, 200
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked and self.headers.get("If-Range") in (None, facts["ETag"]):
            first, last, status = int(asked[1]), min(last, int(asked[2] or last)), 206
            if first >= len(content):
                self.begin(416, {"Content-Length": "0", "Content-Range": f"bytes */{len(content)}"})
                return
            facts = {**facts, "Content-Range": f"bytes {first}-{last}/{len(content)}"}
        self.begin(status, {**facts, "Content-Length": str(last + 1 - first)})
        if self.command == "HEAD":
            return
        flip, stop = len(content) // 2, last + 1
        if first <= flip and self.hub.take("corrupt", name):
            content = content[:flip] + bytes([content[flip] ^ 0xFF]) + content[flip + 1 :]
        if stop - first > 1 and self.hub.take("truncate", name):
            stop, self.close_connection = first + (stop - first) // 2, True
        for start in range(first, stop, _BLOCK):
            block = content[start : min(stop, start + _BLOCK)]
            self.entry.sent += len(block)
            self.wfile.write(block)
            time.sleep(self.hub.faults.block_seconds)

    def commit(self, name: str, repository: Repository, body: bytes) -> None:
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


def git_id(content: bytes) -> str:
    """Return git's id of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
