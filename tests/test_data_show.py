"""`mlxchat data show`: marks of trained text, counts, order, escaping."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from mlxchat.cli import dispatch
from mlxchat.errors import ConfigError

Show = Callable[..., str]


@pytest.fixture
def show(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Show:
    """Run the verb on an own mixture of two tasks; return what it printed."""
    folder = tmp_path / "conf" / "mixture"
    folder.mkdir(parents=True)
    path = tmp_path / "mine.jsonl"
    talks = [{"question": f"q{n}?", "answer": f"sum <<{n}+1={n + 1}>>{n + 1}"} for n in range(8)]
    path.write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    (folder / "my_mixture.yaml").write_text(
        f"mine: {{task: identity_conversations, path: '{path}', epochs: 2}}\nsums: {{task: arithmetic, size: 4}}\n"
    )
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> str:
        assert dispatch(["data", "show", "--config-dir", str(tmp_path / "conf"), *arguments]) == 0
        return capsys.readouterr().out

    return run


def test_tasks_are_counted_and_trained_text_is_between_marks(show):
    printed = show("mixture=my_mixture", "-n", "1", "--task", "mine")
    lines = show("mixture=my_mixture", "-n", "0").splitlines()
    assert lines[0].startswith("mixture my_mixture: 20 conversations, tokens are bytes")
    assert any(re.match(r"mine +16 +80\.0% +\d+ +\d+% +\d+ *$", line) for line in lines)
    assert any(re.match(r"sums +4 +20\.0% ", line) for line in lines)
    n = int(re.search(r"mine conversation (\d)", printed)[1])
    assert (
        f"<|bos|><|user_start|>q{n}?<|user_end|><|assistant_start|>⟦sum <|python_start|>{n}+1<|python_end|>⟧"
        f"<|output_start|>{n + 1}<|output_end|>⟦{n + 1}<|assistant_end|>⟧"
    ) in printed


def test_wrong_arguments_are_refused(show):
    for arguments, expected in (
        ("mixture=my_mixture --task mines", 'there is no "mines" in mixture my_mixture: .*Did you mean "mine"'),
        ("stage=corpus", 'stage is "corpus", expected one of midtrain, sft, preference, rl, eval'),
        ("stage=rl mixture=my_mixture", "mixture= is for midtrain and sft"),
    ):
        with pytest.raises(ConfigError, match=expected):
            show(*arguments.split())
