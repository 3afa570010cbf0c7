"""Crash points; atomically written files and folders, JSON with a digest, append-only JSON lines.

A sealed JSON file ends in `digest`, the sha256 of every byte before it, which reveals truncation and changes.
"""

import errno
import hashlib
import json
import os
import shutil
import signal
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mlxchat.errors import StoreError, redact

# The state at each point. After a kill at any of them, the next run must end with the same result.
CRASH_POINTS = {
    "run.folder": "the run's folder exists, plan.json does not",
    "step.locked": "the step's lock is held, nothing else was done",
    "step.prepared": "work/<key>/out exists and is empty, the inputs are known",
    "step.started": "attempts.jsonl has the start of this attempt",
    "step.ran": "the stage returned, its outputs were not checked",
    "step.recorded": "records are beside the outputs, the attempt has its end",
    "publish.described": "outputs are hashed, there is no manifest",
    "publish.written": "work/<key>/out has its manifest, maybe not yet on disk",
    "publish.synced": "everything is on disk, the folder is still in work/",
    "publish.recorded": "a record leads from the key to the artifact, which may still be in work/",
    "publish.renamed": "the artifact is in store/, the rename maybe not yet on disk",
    "publish.done": "the artifact is in store/, a damaged one was removed",
    "step.cleaned": "the work folder was removed, the lock is held",
    "ref.made": "the new symlink has a temporary name",
    "ref.swapped": "the ref leads to the new artifact",
    "shared.locked": "the lock of a shared artifact is held",
    "shared.made": "a shared artifact was filled, not published",
    "shared.published": "a shared artifact is in store/, its work folder still exists",
    "train.iteration": "an iteration was done, nothing of it was saved",
    "checkpoint.arrays": "arrays of a checkpoint are written, its state is not",
    "checkpoint.written": "a checkpoint is complete under a temporary name",
    "checkpoint.renamed": "a checkpoint has its name, the older ones still exist",
    "checkpoint.done": "the older checkpoints were removed",
    "train.finished": "the last iteration was done, the model is not written",
    "eval.answered": "the results of a batch of questions are in their journal",
    "gc.planned": "the garbage is listed, nothing was touched",
    "gc.moved": "one item was moved to trash/",
    "gc.deleted": "one item in trash/ was deleted",
    "import.checked": "the copy was hashed and is right, it is not in store/",
    "import.renamed": "one imported artifact is in store/",
    "export.synced": "an exported folder is complete and on disk under a temporary name",
    "send.file": "one file was sent, the manifest of its artifact was not",
    "send.described": "all files of an artifact were sent, its manifest was not",
    "fetch.file": "one remote file was copied and is right, its artifact is not complete",
    "fetch.artifact": "one remote artifact was copied under a temporary name",
    "search.ended": "a trial of a search has ended, the journal does not have it",
    "search.told": "the journal of a search has the trial's result",
}

_SIGNALS = {"KILL": signal.SIGKILL, "TERM": signal.SIGTERM, "INT": signal.SIGINT}
_passed: dict[str, int] = {}


def crash_point(name: str) -> None:
    """Inject a fault if the environment names this point, one of CRASH_POINTS; else do nothing."""
    wanted, trace = os.environ.get("MLXCHAT_CRASH_AT"), os.environ.get("MLXCHAT_CRASH_TRACE")
    if wanted is None and trace is None:
        return
    assert name in CRASH_POINTS, name
    _passed[name] = _passed.get(name, 0) + 1
    if trace is not None:
        with Path(trace).open("a") as file:
            file.write(f"{name}\n")
    if wanted is None:
        return
    point, _, passing = wanted.partition(":")
    if point != name or int(passing or 1) != _passed[name]:
        return
    if (failure := os.environ.get("MLXCHAT_CRASH_ERROR")) is not None:
        number = getattr(errno, failure)
        raise OSError(number, os.strerror(number))
    if (command := os.environ.get("MLXCHAT_CRASH_RUN")) is not None:
        import subprocess

        subprocess.run(command, shell=True, check=True)
        return
    os.kill(os.getpid(), _SIGNALS[os.environ.get("MLXCHAT_CRASH_SIGNAL", "KILL")])


_MARK = b',\n "digest": "'
_END_BYTES = 65536
_END = b'"\n}\n'


def seal(record: Mapping[str, Any]) -> bytes:
    """Return a non-empty record as JSON with its digest."""
    rest = {key: value for key, value in record.items() if key != "digest"}
    body = json.dumps(rest, indent=1, ensure_ascii=False, allow_nan=False).removesuffix("\n}").encode()
    return body + _MARK + hashlib.sha256(body).hexdigest().encode() + _END


def unseal(data: bytes) -> dict[str, Any]:
    """Return a sealed record without its digest; ValueError if the bytes were cut or altered."""
    body, mark, end = data.rpartition(_MARK)
    if not mark:
        raise ValueError("it lacks its digest")
    if end != hashlib.sha256(body).hexdigest().encode() + _END:
        raise ValueError("its contents do not match its digest")
    record: dict[str, Any] = json.loads(data)
    del record["digest"]
    return record


@contextmanager
def whole_file(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write to; it is renamed to `path` when the block ends without an error.

    Readers see the old file or the new one, never a part. The temporary name is unique and begins with a dot.
    `durable` calls fsync before the rename, so that the contents survive a power cut.
    """
    unfinished = path.with_name(f".{path.name}-{os.getpid()}-{os.urandom(4).hex()}")
    try:
        yield unfinished
        if durable:
            sync(unfinished)
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def write_whole(path: Path, data: bytes | str, *, durable: bool = True) -> None:
    """Write a file atomically, text as UTF-8; see `whole_file`."""
    with whole_file(path, durable=durable) as unfinished:
        unfinished.write_bytes(data.encode() if isinstance(data, str) else data)


def write_json(path: Path, record: Any) -> None:
    """Write plain data by an atomic rename; missing parent folders are created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(record) + "\n", durable=False)


def read_json(path: Path) -> Any:
    """Return the plain data of a file; None if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def list_folder(folder: Path) -> list[str]:
    """Return the sorted names in a folder without hidden ones; empty if it cannot be read."""
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))  # noqa: PTH208  (speed)
    except OSError:
        return []


def sync(path: Path) -> None:
    """Call fsync on a file or folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def settle(folder: Path) -> None:
    """Fsync a folder and all it contains, and give its files the folder's read and write permissions.

    The safetensors writer makes files readable only by the owner, but several users may share an outputs folder.
    """
    readable = stat.S_IMODE(folder.stat().st_mode) & 0o666
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink() and path.stat().st_mode & 0o777 != readable:
            path.chmod(readable)
        sync(path)
    sync(folder)


@contextmanager
def whole_folder(path: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield an empty folder to fill; it is renamed to `path` when the block ends without an error.

    `path` is absent or an empty folder; `force` replaces it. What a killed process left of an earlier one is removed.
    """
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        check_free(path, force=force)
        remove(unfinished)
        unfinished.mkdir(parents=True)
        yield unfinished
        settle(unfinished)
        crash_point("export.synced")
        check_free(path, force=force)  # another process may have filled it
        remove(path)
        unfinished.rename(path)
        sync(path.parent)
    except OSError as error:
        raise StoreError(f"{path} cannot be written ({error.strerror or error}); no partial output was left") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def check_free(path: Path, *, force: bool = False) -> None:
    """Raise a StoreError if a path is more than an empty folder, and `force` is False."""
    if force or not os.path.lexists(path):
        return
    if not path.is_dir() or path.is_symlink() or any(path.iterdir()):
        raise StoreError(f"{path} exists already. Choose another path, or replace it with --force")


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with all it contains, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


Record = dict[str, Any]


def now() -> str:
    """Return the current time as ISO 8601 in UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class Records:
    """One .jsonl file."""

    def __init__(self, path: Path) -> None:
        self.path = path  # the first `append` creates it

    def append(self, record: Record) -> None:
        """Write one line, unbuffered, without the environment's secrets."""
        # Lone surrogates, which UTF-8 cannot encode, become JSON escapes.
        line = json.dumps(redact(record), ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # cut by a crash
                    file.write(b"\n")
            file.write(line)

    def read(self) -> list[Record]:
        """Return all complete records; a line cut by a crash is skipped."""
        try:
            text = self.path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return []
        # Not splitlines: text may contain U+2028.
        return [record for line in text.split(b"\n") if (record := self.parse(line)) is not None]

    def last(self) -> Record:
        """Return the last complete record in the last 64 kB of a file that may be large and growing; else {}."""
        try:
            with self.path.open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - _END_BYTES))
                lines = file.read().split(b"\n")
        except OSError:
            return {}
        return next((record for line in reversed(lines) if (record := self.parse(line)) is not None), {})

    @staticmethod
    def parse(line: bytes) -> Record | None:
        """Return the record of a line, or None if it is cut or damaged."""
        with suppress(ValueError):
            if isinstance(record := json.loads(line), dict):
                return record
        return None

    def truncate(self, iteration: int) -> None:
        """Drop the records after `iteration`, which a resumed attempt repeats."""
        kept = [record for record in self.read() if record.get("iteration", 0) <= iteration]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept)
        write_whole(self.path, text.encode(errors="backslashreplace"), durable=False)
