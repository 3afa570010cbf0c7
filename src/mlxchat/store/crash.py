"""Fault injection for tests: named points at which a process can be killed, signalled, or given an OSError.

Enabled by `MLXCHAT_CRASH_AT=publish.synced`, or `train.iteration:3` for the third pass. There the process kills itself.
With `MLXCHAT_CRASH_SIGNAL=TERM` (or INT) it sends itself that signal and continues; with `MLXCHAT_CRASH_ERROR=ENOSPC`
(or EROFS, EIO) it raises that OSError; with `MLXCHAT_CRASH_RUN=COMMAND` it runs a command and continues.
`MLXCHAT_CRASH_TRACE=FILE` appends a line to FILE for each pass.
"""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

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
    failure = os.environ.get("MLXCHAT_CRASH_ERROR")
    if failure is not None:
        number = getattr(errno, failure)
        raise OSError(number, os.strerror(number))
    command = os.environ.get("MLXCHAT_CRASH_RUN")
    if command is not None:
        import subprocess

        subprocess.run(command, shell=True, check=True)
        return
    os.kill(os.getpid(), _SIGNALS[os.environ.get("MLXCHAT_CRASH_SIGNAL", "KILL")])
