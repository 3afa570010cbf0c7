"""Secrets are never written."""

import json
import sys
from pathlib import Path

import pytest

from kit.toys import CHAIN
from mlxchat.errors import StepFailed

SECRETS = {
    "HF_TOKEN": "hf_abcdefgh12345", "WANDB_API_KEY": "0123456789abcdef0123", "MY_SECRET": 'quoted "secret" ümläut',
    "DB_PASSWORD": "pa/ss word+1", "GITHUB_TOKEN": "ghp_zzzzzzzzzzzz", "AWS_SECRET_ACCESS_KEY": "AKsecret+/=long",
}  # fmt: skip


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    return SECRETS


def leaks(folder: Path, secrets: dict[str, str]) -> list[str]:
    """Return the files that hold a secret in any of the forms in which it could be written."""
    found = []
    for path in folder.rglob("*"):
        data = path.read_bytes() if path.is_file() else b""
        for name, value in secrets.items():
            forms = {value, json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1]}
            found += [f"{path}: {name}" for form in forms if form.encode() in data or form in path.name]
    return found


def test_secrets_reach_no_file_or_output(toys, secrets, monkeypatch):
    everything = " ".join(secrets.values())
    monkeypatch.setattr(sys, "argv", ["mlxchat", f"name='{everything}'"])
    toys.add("make", """
        told = " ".join(os.environ[name] for name in ("HF_TOKEN", "MY_SECRET", "DB_PASSWORD"))
        ctx.log({"iteration": 1, "told": told})
        ctx.externals.append({"url": f"https://x/{os.environ['HF_TOKEN']}"})
        ctx.derived["header"] = told
        (ctx.out / "result.txt").write_text("1")
    """)  # fmt: skip
    told = "' '.join(os.environ[name] for name in ('WANDB_API_KEY', 'MY_SECRET', 'GITHUB_TOKEN'))"
    toys.add("copy", f"raise ValueError({told})", inputs={"source": "thing"}, config=("other",))
    with pytest.raises(StepFailed) as caught:
        toys.run(toys.plan(CHAIN))
    assert leaks(toys.outputs, secrets) == []
    text = "\n".join([str(caught.value), *toys.said])
    assert [name for name, value in secrets.items() if value in text] == []
    assert "<WANDB_API_KEY>" in str(caught.value)
    manifest = toys.store.made(toys.plan(CHAIN)[0].key)
    assert manifest["externals"] == [{"url": "https://x/<HF_TOKEN>"}]


def test_secrets_of_the_command_line_reach_no_file(say, tiny, tmp_path, monkeypatch):
    secrets = {"HF_TOKEN": "hf_abcdefgh12345", "WANDB_API_KEY": "0123456789abcdef0123", "DB_PASSWORD": "pass-word-1"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    settings = [*tiny, "stage=corpus", f"outputs={tmp_path / 'outputs'}"]
    planted = f'tracker.project="{secrets["HF_TOKEN"]} {secrets["DB_PASSWORD"]}"'
    sweep = ["-m", "corpus.shard_documents=5,6", f"tracker.project={secrets['HF_TOKEN']},{secrets['DB_PASSWORD']}"]
    for arguments in ([*settings, planted], [*sweep, *settings]):
        monkeypatch.setattr(sys, "argv", ["mlxchat", *arguments])
        said = say(*arguments)
        assert [name for name, value in secrets.items() if value in said] == []
    assert list((tmp_path / "outputs" / "multirun").glob("*/table.md"))
    assert leaks(tmp_path / "outputs", secrets) == []
