"""The same command on every rank: rank 0 runs it, the others follow rank 0 if it computes, and end if it does not."""

from __future__ import annotations

import os
import sys

from mlxchat.launch.meeting import Meeting, find_meeting, forget_meeting
from mlxchat.verbs import VERBS

# Options with which `run` only tells something.
_TELLING = {
    "--help", "-h", "--version", "-V", "--cfg", "-c", "--info", "-i", "--hydra-help", "--shell-completion", "-sc",
}  # fmt: skip


def enter(arguments: list[str]) -> int | None:
    """Become the rank that the environment names; return the exit code if that was all there is to do.

    Returns:
        None on rank 0, and where this process is alone: the command is to be run.

    Raises:
        MlxchatError: the ranks cannot meet, or cannot work together.
    """
    meeting = find_meeting()
    if meeting is None:
        return None
    if not computes(arguments):
        forget_meeting()
        return None if meeting.rank == 0 else 0
    if meeting.rank == 0:
        from mlxchat.launch.ranks import meet

        meet(meeting, lambda line: print(line, flush=True))
        return None
    return _follow(meeting)


def computes(arguments: list[str]) -> bool:
    """Tell whether a command line is one whose steps all ranks compute: `run`, and what is short for it."""
    verb = arguments[0] if arguments and arguments[0] in VERBS else "run"
    if verb != "run" or (arguments and arguments[0] in ("help", "_complete")):
        return False
    return not _TELLING & {argument.partition("=")[0] for argument in arguments}


def _follow(meeting: Meeting) -> int:
    from mlxchat.launch.follow import follow

    code = follow(meeting, says=meeting.rank == 1)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # MLX's threads may still wait for a rank that is gone
