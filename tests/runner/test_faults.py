"""Retries, time limits, hooks, clock jumps, secrets, sleep."""

import errno
import importlib
import itertools
import json
import os
import signal
import sys
import time
import urllib.error
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from kit.servers import Loopback, QuietHandler
from kit.toys import CHAIN, ONE
from mlxchat.config.secrets import redact
from mlxchat.errors import DataError, Interrupted, PassingError, StepFailed
from mlxchat.runner import run
from mlxchat.runner.process import Hooks, keep_awake
from mlxchat.runner.run import Policy, is_passing
from mlxchat.store import attempts, files
from mlxchat.store.files import Records

RETRY = Policy(retry_attempts=3, retry_seconds=0.01)


class Answer(Exception):
    """An error of an HTTP library, which has the server's answer."""

    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.response = type("Response", (), {"status_code": status})()


def wrapped(cause: Exception) -> Exception:
    """Return the error that a stage makes of another one, with `from None`."""
    try:
        try:
            raise cause
        except Exception:
            raise DataError("the Hub cannot be asked") from None
    except DataError as error:
        return error


def test_network_and_server_errors_are_transient_and_others_are_not():
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    httpx = importlib.import_module(HTTPError.__module__)  # whatever it is called in this version
    request = httpx.Request("GET", "http://x")
    passing = [
        PassingError("busy"), ConnectionResetError(), TimeoutError(), OSError(errno.ENETUNREACH, "no network"),
        Answer(500), Answer(503), Answer(429), Answer(408), wrapped(ConnectionRefusedError()), wrapped(Answer(502)),
        urllib.error.URLError(ConnectionRefusedError()), urllib.error.HTTPError("u", 504, "", {}, None),  # type: ignore[arg-type]  # headers
        httpx.ConnectError("no route", request=request), httpx.ReadTimeout("slow", request=request),
        HfHubHTTPError("busy", response=httpx.Response(503, request=request)),
    ]  # fmt: skip
    permanent = [
        ValueError("no"), DataError("line 3"), StepFailed("no"), FileNotFoundError(errno.ENOENT, "no file"),
        OSError(errno.ENOSPC, "full"), PermissionError(errno.EACCES, "no"), MemoryError(), Answer(404), Answer(401),
        wrapped(Answer(403)), urllib.error.HTTPError("u", 404, "", {}, None),  # type: ignore[arg-type]  # headers
        HfHubHTTPError("gone", response=httpx.Response(404, request=request)),
    ]  # fmt: skip
    assert [error for error in passing if not is_passing(error)] == []
    assert [error for error in permanent if is_passing(error)] == []


FAILS_TWICE = """
tries = ctx.out.parents[2] / "tries"
number = len(tries.read_text()) + 1 if tries.exists() else 1
tries.write_text("x" * number)
(ctx.out / f"of try {number}").touch()
if number < 3:
    raise ConnectionResetError("the hub hung up")
(ctx.out / "result.txt").write_text("1")
"""


def test_transient_errors_are_retried_with_growing_pauses(toys):
    toys.add("make", FAILS_TWICE)
    run = toys.run(toys.plan(ONE), policy=RETRY)
    manifest = toys.store.made(toys.plan(ONE)[0].key)
    assert [attempt["outcome"] for attempt in manifest["attempts"]] == ["failed", "failed", "done"]
    assert [file["path"] for file in manifest["outputs"]] == ["of try 3", "result.txt"], "nothing of the other tries"
    pauses = [
        event["seconds"] for event in Records(run.folder / "events.jsonl").read() if event["event"] == "step_retries"
    ]
    assert pauses == [0.01, 0.02]
    assert any(
        "failed (ConnectionResetError: the hub hung up), which may pass: try 2 of 3" in line for line in toys.said
    )


def test_last_attempt_and_permanent_errors_fail_the_step(toys):
    toys.add("make", FAILS_TWICE)
    with pytest.raises(StepFailed, match="the hub hung up"):
        toys.run(toys.plan(ONE), policy=Policy(retry_attempts=2, retry_seconds=0.01))
    assert (toys.outputs / "tries").read_text() == "xx"
    (toys.outputs / "tries").unlink()
    toys.add("make", FAILS_TWICE.replace("ConnectionResetError", "ValueError"))
    with pytest.raises(StepFailed, match="ValueError: the hub hung up"):
        toys.run(toys.plan(ONE), policy=RETRY)
    assert (toys.outputs / "tries").read_text() == "x"


def test_stop_ends_the_pause_between_attempts(toys, monkeypatch):
    toys.add("make", FAILS_TWICE)
    pause = run._pause
    monkeypatch.setattr(run, "_pause", lambda *given: (os.kill(os.getpid(), signal.SIGTERM), pause(*given)))
    began = time.monotonic()
    with pytest.raises(Interrupted, match="stopped before another attempt of one"):
        toys.run(toys.plan(ONE), policy=Policy(retry_attempts=3, retry_seconds=60))
    assert time.monotonic() - began < 10


WAITS = """
from pathlib import Path
(ctx.work).mkdir(parents=True, exist_ok=True)
for step in range(600):
    time.sleep(0.01)
    if ctx.should_stop():
        (ctx.work / "saved").write_text(str(step))
        raise ctx.stop(f"iteration {step} of 600")
(ctx.out / "result.txt").touch()
"""


def test_step_over_its_time_limit_saves_and_fails(toys):
    toys.add("make", WAITS)
    with pytest.raises(
        StepFailed, match=r"took longer than timeout\.one=0\.2 seconds\. one stopped at iteration"
    ) as caught:
        toys.run(toys.plan(ONE), policy=Policy(timeouts={"one": 0.2}))
    assert caught.value.exit_code == 1
    assert "The same command continues from there" in str(caught.value)
    work = toys.store.work(toys.plan(ONE)[0].key)
    assert (work / "ckpt" / "saved").exists()
    assert [attempt["outcome"] for attempt in attempts.read(work)] == ["failed"]


def test_step_that_ignores_its_limit_is_ended(toys, monkeypatch):
    toys.add("make", "time.sleep(60)")
    monkeypatch.setattr(run, "GRACE_SECONDS", 0.2)
    began = time.monotonic()
    with pytest.raises(StepFailed, match="did not stop when requested, and was ended"):
        toys.run(toys.plan(ONE), policy=Policy(timeouts={"one": 0.1}))
    assert time.monotonic() - began < 10


@pytest.fixture
def server() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A web server that remembers what is posted; its address, and that."""
    posted: list[dict[str, Any]] = []

    class Handler(QuietHandler):
        protocol_version = "HTTP/1.0"

        def do_POST(self) -> None:
            posted.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(500 if "broken" in self.path else 200)
            self.end_headers()

    with Loopback(Handler) as serving:
        yield serving.url, posted


def test_hook_commands_run_in_order_with_facts(toys, tmp_path):
    log = tmp_path / "log"
    shell = f'echo "$MLXCHAT_EVENT $MLXCHAT_STEP $MLXCHAT_STAGE" >> {log}'
    words = [sys.executable, "-c", f"import os; open({str(log)!r}, 'a').write(os.environ['MLXCHAT_ARTIFACT'] + '\\n')"]
    run = toys.run(toys.plan(CHAIN), hooks=Hooks(on_start=shell, on_success=words))
    names = [step.artifact for step in toys.plan(CHAIN)]
    assert log.read_text().splitlines() == ["on_start one make", names[0], "on_start two copy", names[1]]
    assert run.hooks._thread is None


def test_hook_url_receives_json(toys, server):
    address, posted = server
    toys.add("make", "raise ValueError('oh no')")
    with pytest.raises(StepFailed):
        toys.run(toys.plan(ONE), hooks=Hooks(on_start=address, on_success=address, on_failure=address))
    assert [(facts["event"], facts["step"]) for facts in posted] == [("on_start", "one"), ("on_failure", "one")]
    assert "ValueError: oh no" in posted[1]["error"]
    assert posted[0]["run"] == "run1"


BROKEN = ["exit 3", ["/no/such/program"], "sleep 60", "{address}/broken"]


@pytest.mark.parametrize("target", BROKEN, ids=str)
def test_broken_hook_warns_once_and_breaks_nothing(target, toys, server):
    target = target.format(address=server[0]) if isinstance(target, str) else target
    began = time.monotonic()
    hooks = Hooks(on_start=target, on_success=target, warn=toys.said.append, timeout_seconds=0.3)
    toys.run(toys.plan(CHAIN), hooks=hooks)
    assert time.monotonic() - began < 10
    assert [step.state for step in toys.plan(CHAIN)] == ["done", "done"]
    warnings = [line for line in toys.said if line.startswith("warning: hooks")]
    assert 1 <= len(warnings) <= 3
    assert len({line.split(" failed")[0] for line in warnings}) == len(warnings), "each is warned of once"


def test_slow_hook_delays_no_step(toys, tmp_path):
    """The hook ends only once all steps are done."""
    hooks = Hooks(on_start=f"while [ ! -e {tmp_path}/done ]; do sleep 0.01; done", warn=toys.said.append)
    ended = f"open({str(tmp_path / 'done')!r}, 'w').close(); (ctx.out / 'result.txt').touch()"
    toys.add("copy", ended, inputs={"source": "thing"})
    toys.run(toys.plan(CHAIN), hooks=hooks)
    assert not [line for line in toys.said if line.startswith("warning")]


def test_clock_jumps_change_no_duration(toys, monkeypatch):
    jumps, real = itertools.cycle((0.0, -7_200.0, 259_200.0, -34_560_000.0)), time.time

    class JumpingClock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]  # the base class returns its own type
            return datetime.now(tz) + timedelta(seconds=next(jumps))

    monkeypatch.setattr(files, "datetime", JumpingClock)
    monkeypatch.setattr(time, "time", lambda: real() + next(jumps))
    toys.add("make", "time.sleep(0.05); (ctx.out / 'result.txt').write_text('1')")
    toys.run(toys.plan(CHAIN))
    manifest = toys.store.made(toys.plan(CHAIN)[0].key)
    assert 0.05 <= manifest["seconds"] < 5
    assert 0.05 <= manifest["attempts"][0]["seconds"] < 5
    run = toys.run(toys.plan(CHAIN))
    assert [event["event"] for event in Records(run.folder / "events.jsonl").read()] == [
        "run_started", "step_cached", "step_cached", "run_done",
    ]  # fmt: skip


SECRETS = {
    "HF_TOKEN": "hf_abcdefgh12345", "WANDB_API_KEY": "0123456789abcdef0123", "MY_SECRET": 'quoted "secret" ümläut',
    "DB_PASSWORD": "pa/ss word+1", "GITHUB_TOKEN": "ghp_zzzzzzzzzzzz", "AWS_SECRET_ACCESS_KEY": "AKsecret+/=long",
}  # fmt: skip


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    return SECRETS


def test_secrets_are_replaced_by_variable_names(secrets):
    nested = {"a": [f"x {value} y" for value in secrets.values()], SECRETS["HF_TOKEN"]: 1, "n": 2.5, "none": None}
    assert redact(nested) == {"a": [f"x <{name}> y" for name in secrets], "<HF_TOKEN>": 1, "n": 2.5, "none": None}
    assert redact("pa%2Fss%20word%2B1") == "<DB_PASSWORD>", "as part of an address"


def test_other_variables_and_short_values_are_kept(monkeypatch):
    kept = {"TOKENIZERS_PARALLELISM": "false-ish", "MAX_TOKENS": "1048576", "HOME": "/root/home", "X_TOKEN": "abc"}
    for name, value in kept.items():
        monkeypatch.setenv(name, value)
        assert redact(f"x {value} y") == f"x {value} y"


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
    monkeypatch.setattr(sys, "argv", ["mlxchat", f"hooks.on_start=curl -H '{everything}'"])
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
        toys.run(toys.plan(CHAIN), hooks=Hooks(on_failure="echo $HF_TOKEN >&2; exit 1", warn=toys.said.append))
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
    planted = f'hooks.on_success="true {secrets["HF_TOKEN"]} {secrets["DB_PASSWORD"]}"'
    wrong = ["corpus.validation_documents=100000", f"corpus.name={secrets['WANDB_API_KEY']}"]
    sweep = ["-m", "corpus.row_group_documents=5,6", f"hooks.on_start={secrets['HF_TOKEN']},{secrets['DB_PASSWORD']}"]
    for arguments, code in (([*settings, planted], 0), ([*settings, planted, *wrong], 2), ([*sweep, *settings], 0)):
        monkeypatch.setattr(sys, "argv", ["mlxchat", *arguments])
        said = say(*arguments, code=code)
        assert [name for name, value in secrets.items() if value in said] == []
    assert len(list((tmp_path / "outputs" / "runs").glob("*/plan.json"))) >= 2
    assert list((tmp_path / "outputs" / "multirun").glob("*/table.md"))
    assert leaks(tmp_path / "outputs", secrets) == []


def test_mac_is_kept_awake_during_a_run(tmp_path, monkeypatch):
    program, log = tmp_path / "caffeinate", tmp_path / "log"
    program.write_text(f'#!/bin/sh\necho "$@" > {log}.new\nmv {log}.new {log}\nexec sleep 60\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(sys, "platform", "darwin")
    with keep_awake():
        until = time.monotonic() + 10
        while not log.exists() and time.monotonic() < until:
            time.sleep(0.01)
    assert log.read_text() == f"-i -w {os.getpid()}\n"
