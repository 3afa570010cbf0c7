"""Impossible values of a teacher; `validation.py` holds the rest."""

from __future__ import annotations

from collections.abc import Iterator

from mlxchat.teacher_config import TeacherConfig

# Below, exponentials of 15 / T are beyond float32.
_LEAST_TEMPERATURE = 0.5


def find_teacher_problems(where: str, teacher: TeacherConfig) -> Iterator[str]:
    """Yield a line for every value that cannot be, with what was expected."""
    if teacher.path is not None and teacher.artifact is not None:
        yield f"{where}.path and {where}.artifact are both set: there is one teacher"
    if not 0 < teacher.weight <= 1:
        yield f"{where}.weight is {teacher.weight}, expected above 0 and at most 1; no teacher: {where}.path=null"
    if not teacher.temperature >= _LEAST_TEMPERATURE:
        yield f"{where}.temperature is {teacher.temperature}, expected at least {_LEAST_TEMPERATURE}"
    if teacher.top_k is not None and teacher.top_k < 1:
        yield f"{where}.top_k is {teacher.top_k}, expected at least 1, or null for all"
