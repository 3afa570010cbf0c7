"""Caches of ranks, and the path of a teacher."""

from pathlib import Path
from typing import Any

import mlx.core as mx

from kit import ranks
from mlxchat.distributed.team import Team
from mlxchat.engine.generate import clear_caches
from mlxchat.ops.loss import Mix
from mlxchat.planning.memory import TeacherSize
from mlxchat.training.teacher import Distillation, OutsideTeacher
from mlxchat.training.team_step import send_teacher

SIZE = TeacherSize(weights=1, kept_per_token=1, working_per_token=1)


def fill(team: Team, request: dict[str, Any], arrays: dict[str, mx.array]) -> None:
    mx.eval(mx.zeros(request["bytes"] // 4) + 1)


def cached(team: Team, request: dict[str, Any], arrays: dict[str, mx.array]) -> list[int]:
    return team.group.gather_json(mx.get_cache_memory())


def clear(team: Team) -> list[list[int]]:
    team.call(fill, {"bytes": 2**24})
    before = team.call(cached)
    clear_caches(team)
    return [before, team.call(cached)]


def test_all_ranks_clear_their_caches():
    before, after = ranks.lead_ranks(clear, 2)
    assert min(before) >= 2**24
    assert max(after) < 2**20


def test_a_teachers_folder_is_sent_as_an_absolute_path(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    teacher = OutsideTeacher(None, 10, Path("teacher"))
    sent = send_teacher(Team(), Distillation(teacher=teacher, mix=Mix(weight=0.5), size=SIZE))
    assert sent["folder"] == str(tmp_path / "teacher")
