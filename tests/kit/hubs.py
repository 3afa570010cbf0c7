"""A server in a thread of this process, and a Hugging Face Hub on it: downloads with faults, uploads by its client."""

import base64
import fnmatch
import hashlib
import json
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_BLOCK = 1 << 14


class Handler(BaseHTTPRequestHandler):
    """HTTP/1.1 with JSON and without a log."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def begin(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def say(self, value: Any, status: int = 200, **headers: str) -> None:
        """Answer with JSON, or with bytes as they are."""
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        more = {name.replace("_", "-"): text for name, text in headers.items()}
        self.begin(status, {"Content-Type": "application/json", "Content-Length": str(len(data)), **more})
        if self.command != "HEAD":
            self.wfile.write(data)


class Loopback(ThreadingHTTPServer):
    """A server on a free port, started and stopped as a context manager; broken connections print nothing."""

    daemon_threads = True

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_: Any) -> None:
        pass

    def __enter__(self) -> Self:
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self.shutdown()
        self.server_close()
        self.thread.join()


@dataclass
class Faults:
    """Faults of the hub. Patterns match file paths; `times` is per file, 0 means always."""

    fail_first: int = 0
    status: int = 503
    truncate: str = ""
    corrupt: str = ""
    times: int = 1
    block_seconds: float = 0.0  # after each 16 kB of a file
    broken: str = ""  # a part of the addresses that are answered with 400


@dataclass
class Repository:
    """Contents and visibility of a repository."""

    files: dict[str, bytes] = field(default_factory=dict)
    commit: str = COMMIT
    lfs: tuple[str, ...] = (".parquet", ".zip", ".safetensors", ".pt", ".pkl")
    kind: str = "dataset"
    private: bool = False
    commits: list[str] = field(default_factory=list)  # messages of what was pushed

    def entry(self, path: str) -> dict[str, Any] | None:
        """Return a tree's entry of a file or folder, or None."""
        if path not in self.files:
            below = any(each.startswith(f"{path}/") for each in self.files)
            return {"type": "directory", "path": path, "oid": "0" * 40} if below else None
        entry = {"type": "file", "path": path, "size": len(self.files[path]), "oid": git_id(self.files[path])}
        large = {"lfs": {"oid": sha256(self.files[path]), "size": entry["size"], "pointerSize": 130}}
        return entry | (large if path.endswith(self.lfs) else {})

    def tree(self, folder: str, deep: bool) -> list[dict[str, Any] | None]:
        """Return the entries of a folder, or of all below it."""
        below = f"{folder}/" if folder else ""
        paths = [path for path in self.files if path.startswith(below)]
        found = set(paths) if deep else {below + path.removeprefix(below).split("/")[0] for path in paths}
        return [self.entry(path) for path in sorted(found)]


class LoopbackHub(Loopback):
    """The server, as a context manager. All may be changed while it runs."""

    def __init__(self) -> None:
        super().__init__(_Handler)
        self.token: str | None = None  # which every request must have
        self.repositories: dict[str, Repository] = {}
        self.files: dict[str, bytes] = {}  # below /files/
        self.faults = Faults()
        self.stored: dict[str, bytes] = {}  # large files that were uploaded, by sha256
        self.log: list[tuple[str, str]] = []  # method and path
        self.bytes_sent = Counter[str]()
        self.lock, self.done = threading.Lock(), Counter[tuple[str, str]]()

    def add(self, name: str, files: dict[str, bytes], **more: Any) -> Repository:
        self.repositories[name] = Repository(files, **more)
        return self.repositories[name]

    def requests(self, part: str) -> list[tuple[str, str]]:
        """Return the requests for files whose path ends with `part`."""
        return [(method, path) for method, path in self.log if path.endswith(part) and "/api/" not in path]

    def sent(self, part: str) -> int:
        """Return the bytes of files that were sent."""
        return sum(count for path, count in self.bytes_sent.items() if path.endswith(part))

    def take(self, fault: str, path: str) -> bool:
        """Return whether this answer has the fault, and count it."""
        if not fnmatch.fnmatchcase(path, getattr(self.faults, fault)):
            return False
        with self.lock:
            self.done[fault, path] += 1
            return not self.faults.times or self.done[fault, path] <= self.faults.times


class _Handler(Handler):
    server: LoopbackHub

    def do_GET(self) -> None:
        hub, path, body = self.server, unquote(urlsplit(self.path).path), self.body()
        hub.log.append((self.command, path))
        with hub.lock:
            fails = hub.faults.fail_first > 0
            hub.faults.fail_first -= fails
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        parts = path.strip("/").split("/")
        try:
            if fails or (hub.faults.broken and hub.faults.broken in path):
                self.say({"error": "injected"}, hub.faults.status if fails else 400)
            elif parts[0] == "put":
                assert sha256(body) == parts[1]
                hub.stored[parts[1]] = body
                self.say({})
            elif hub.token not in (None, token):
                self.say({"error": "Invalid username or password."}, 401)
            elif parts[0] == "files":
                content = hub.files["/".join(parts[1:])]
                self.say_file("/".join(parts[1:]), content, {"ETag": f'"{sha256(content)}"'})
            elif parts[0] == "api":
                self.say_api(parts[1:], body)
            elif parts[-1] == "batch":
                objects = json.loads(body)["objects"]
                for each in objects:
                    each["actions"] = {"upload": {"href": f"{hub.url}/put/{each['oid']}"}}
                self.say({"transfer": "basic", "objects": objects})
            else:
                self.resolve(parts[1:] if parts[0] == "datasets" else parts)
        except KeyError as error:
            self.say({"error": str(error)}, 404, X_Error_Code="EntryNotFound")

    do_HEAD = do_PUT = do_POST = do_GET

    def resolve(self, parts: list[str]) -> None:
        """Answer a request for NAME/resolve/REVISION/PATH."""
        repository, name = self.server.repositories["/".join(parts[:2])], "/".join(parts[4:])
        content = repository.files[name]
        if parts[3] not in (repository.commit, "main"):
            raise KeyError(parts[3])
        facts = {"X-Repo-Commit": repository.commit, "ETag": f'"{git_id(content)}"'}
        if name.endswith(repository.lfs):
            facts["ETag"] = facts["X-Linked-Etag"] = f'"{sha256(content)}"'
            facts["X-Linked-Size"] = str(len(content))
        self.say_file(name, content, facts)

    def say_api(self, parts: list[str], body: bytes) -> None:
        hub = self.server
        if parts == ["repos", "create"]:
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            private = asked.get("visibility") == "private" or bool(asked.get("private"))
            hub.repositories.setdefault(name, Repository(kind="model", private=private))
            self.say({"url": f"{hub.url}/{name}", "name": name})
            return
        if parts == ["validate-yaml"]:
            self.say({"errors": [], "warnings": []})
            return
        kind, name, verb = parts[0][:-1], "/".join(parts[1:3]), parts[3] if len(parts) > 3 else "revision"
        repository = hub.repositories.get(name)
        if repository is None or repository.kind != kind:
            self.say({"error": "no such repository"}, 404 if hub.token else 401, X_Error_Code="RepoNotFound")
        elif len(parts) > 4 and parts[4] not in ("main", repository.commit):
            self.say({"error": "no such revision"}, 404, X_Error_Code="RevisionNotFound")
        elif verb == "revision":
            names = [{"rfilename": path} for path in sorted(repository.files)]
            self.say({"_id": "0", "id": name, "sha": repository.commit, "siblings": names,
                      "private": repository.private, "tags": [], "downloads": 0, "likes": 0})  # fmt: skip
        elif verb == "tree":
            folder = "/".join(parts[5:])
            found = repository.tree(folder, "recursive=true" in self.path.lower() or not folder)
            if folder and not found:
                raise KeyError(folder)
            self.say(found)
        elif verb == "paths-info":
            paths = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode())["paths"]
            self.say([entry for path in paths if (entry := repository.entry(path)) is not None])
        elif verb == "preupload":
            paths = [each["path"] for each in json.loads(body)["files"]]
            modes = {path: "lfs" if path.endswith(repository.lfs) else "regular" for path in paths}
            self.say({"files": [{"path": path, "uploadMode": modes[path], "shouldIgnore": False} for path in paths]})
        else:
            self.commit(name, repository, body)

    def say_file(self, name: str, content: bytes, facts: dict[str, str]) -> None:
        stop = len(content)
        self.begin(200, {**facts, "Content-Length": str(stop)})
        if self.command == "HEAD":
            return
        if self.server.take("corrupt", name):
            flip = stop // 2
            content = content[:flip] + bytes([content[flip] ^ 0xFF]) + content[flip + 1 :]
        if self.server.take("truncate", name):
            stop, self.close_connection = stop // 2, True
        for start in range(0, stop, _BLOCK):
            block = content[start : min(stop, start + _BLOCK)]
            self.server.bytes_sent[name] += len(block)
            self.wfile.write(block)
            time.sleep(self.server.faults.block_seconds)

    def commit(self, name: str, repository: Repository, body: bytes) -> None:
        files = dict(repository.files)
        for line in body.splitlines():
            entry: dict[str, Any] = json.loads(line)
            kind, value = entry["key"], entry["value"]
            if kind == "header":
                repository.commits.append(value["summary"])
            elif kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.server.stored[value["oid"]]
        repository.files = files
        oid = f"{len(repository.commits):040d}"
        self.say({"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{name}/commit/{oid}"})


def git_id(content: bytes) -> str:
    """Return git's id of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
