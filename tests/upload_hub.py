"""The uploading side of a Hugging Face Hub, on this machine: repositories are made, large files and commits arrive.

It answers what the official client asks (create, preupload, LFS batch, commit) and knows what was committed. Standard
library only; `fail` makes every request whose path has that part end in an error.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

_LARGE = (".safetensors", ".pt", ".pkl")


@dataclass
class Repository:
    """What is in a repository, and who may see it."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)

    def entry(self, path: str) -> dict[str, Any] | None:
        """Return what a tree says of a file or folder, or None."""
        content = self.files.get(path)
        if content is not None:
            return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        if any(each.startswith(f"{path}/") for each in self.files):
            return {"type": "directory", "path": path, "oid": "0" * 40}
        return None


@dataclass
class UploadHub:
    """The server, as a context manager."""

    token: str = "hf_right_token"
    fail: str = ""
    status: int = 400
    xet: dict[str, Any] | None = None
    """What a request for a token of Xet storage gets; None: what any unknown address of a repository gets."""
    repositories: dict[str, Repository] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    """Large files by sha256, committed or not."""
    log: list[tuple[str, str]] = field(default_factory=list)

    def __enter__(self) -> UploadHub:
        class Handler(_Handler):
            hub = self

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: UploadHub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_PUT(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.body()
        self.hub.log.append((self.command, path))
        if self.hub.fail and self.hub.fail in path:
            self.say({"error": "injected"}, self.hub.status)
        elif path.startswith("/put/"):
            self.put(path.removeprefix("/put/"), body)
        elif self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self.say({"error": "Invalid username or password."}, 401)
        elif "/resolve/" in path:
            self.resolve(path)
        else:
            self.route(path, body)

    def route(self, path: str, body: bytes) -> None:
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.hub.repositories.setdefault(
                name, Repository(asked.get("visibility") == "private" or bool(asked.get("private")))
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
            self.say({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            return
        verb = parts[2] if len(parts) > 2 else "info"
        if verb == "xet-write-token" and self.hub.xet is not None:
            self.say(self.hub.xet)
        elif verb == "preupload":
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
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(part)

    def put(self, sha256: str, body: bytes) -> None:
        assert hashlib.sha256(body).hexdigest() == sha256
        self.hub.stored[sha256] = body
        self.say({})

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

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().strip() or b"0", 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def say(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        for key, one in {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **(headers or {}),
        }.items():
            self.send_header(key, one)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
