"""Commands and web addresses that are told when a step starts, is done or has failed. They can never break a run.

They are told one after the other by a thread of their own, so a slow one delays nobody. A broken one is warned of once.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mlxchat.config.secrets import redact

# What one notification may take, and what the end of a run waits for those still on their way.
TIMEOUT_SECONDS = 10.0

Target = str | list[str] | None


@dataclass(kw_only=True)
class Hooks:
    """Whom to tell. A target is an http(s) address, a command line for the shell, or a command as a list."""

    on_start: Target = None
    on_success: Target = None
    on_failure: Target = None
    warn: Callable[[str], None] = print
    timeout_seconds: float = TIMEOUT_SECONDS
    _waiting: queue.Queue[tuple[str, dict[str, Any]] | None] = field(default_factory=queue.Queue, init=False)
    _thread: threading.Thread | None = field(default=None, init=False)
    _warned: set[str] = field(default_factory=set, init=False)

    def tell(self, name: str, **facts: Any) -> None:
        """Have the target of `on_start`, `on_success` or `on_failure` told, soon.

        A command finds the facts as variables (step → MLXCHAT_STEP), an address gets them as JSON.
        """
        if getattr(self, name) is None:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="hooks", daemon=True)
            self._thread.start()
        self._waiting.put((name, redact({"event": name, **facts})))

    def finish(self) -> None:
        """Wait for what was not told yet, but not for long."""
        if self._thread is not None:
            self._waiting.put(None)
            self._thread.join(self.timeout_seconds)
            if self._thread.is_alive():
                self._complain("hooks", f"still busy after {self.timeout_seconds:g} s, left alone")
            self._thread = None

    def _work(self) -> None:
        while (entry := self._waiting.get()) is not None:
            name, facts = entry
            target: Target = getattr(self, name)
            try:
                if isinstance(target, str) and target.startswith(("http://", "https://")):
                    self._post(target, facts)
                elif target is not None:
                    self._call(target, facts)
            except Exception as error:
                self._complain(name, f"{type(error).__name__}: {error}")

    def _call(self, command: str | list[str], facts: dict[str, Any]) -> None:
        variables = {f"MLXCHAT_{key.upper()}": str(value) for key, value in facts.items() if value is not None}
        process = subprocess.Popen(
            command, shell=isinstance(command, str), env=os.environ | variables, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        try:
            _, complaint = process.communicate(timeout=self.timeout_seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # what a shell has started too
            process.communicate()
            raise TimeoutError(f"killed after {self.timeout_seconds:g} s") from None
        if process.returncode:
            last = complaint.decode(errors="replace").strip().splitlines()[-1:]
            raise RuntimeError(" ".join([f"ended with {process.returncode}", *last]))

    def _post(self, address: str, facts: dict[str, Any]) -> None:
        import urllib.request

        body = json.dumps(facts).encode()
        request = urllib.request.Request(address, body, {"Content-Type": "application/json"}, method="POST")
        urllib.request.urlopen(request, timeout=self.timeout_seconds).close()

    def _complain(self, name: str, problem: str) -> None:
        if name not in self._warned:
            self._warned.add(name)
            self.warn(redact(f"warning: hooks.{name} does not work ({problem}); the run goes on without it"))
