"""Settings and verbs that 0.2 had: typing one tells what replaces it, from the table that CHANGELOG has."""

from pathlib import Path

import pytest

from kit.commands import Say
from mlxchat.composition.overrides import known_keys
from mlxchat.config.replaced import SETTINGS, VERBS, find_replacement, upgrade_table
from mlxchat.config.schema import Config
from mlxchat.config.verbs import VERBS as PRESENT


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["optimizer.momentum_end=0.9"], "Instead: optimizer.momentum.start, end, final, warmup_iterations."),
        (["retry.attempts=3"], "Instead: downloads retry by themselves"),
        (["code=ignore", "plan"], "Instead: changed code is named"),
        (["sft.adapter.beta1=0.3"], "Instead: a constant now"),
        (["leaderboard"], "Instead: mlxchat compare --sort"),
        (["data", "ls"], "Instead: hf cache ls."),
    ],
)
def test_what_is_gone_is_told_with_its_replacement(say: Say, words: list[str], told: str):
    printed = say(*words, code=2)
    assert "gone since version 0.3" in printed
    assert told in printed


def test_only_what_is_gone_is_called_so():
    assert not [key for key in known_keys(Config) if find_replacement(key)]
    assert not [verb for verb in PRESENT if find_replacement(verb)]
    assert not find_replacement("optimizer.matrx_lr")


def test_changelog_has_the_table():
    assert upgrade_table() in Path(__file__).parents[1].joinpath("CHANGELOG.md").read_text(encoding="utf-8")
    assert len(SETTINGS) > 30
    assert VERBS
