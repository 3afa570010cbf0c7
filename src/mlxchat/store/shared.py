"""Artifacts that stages make on demand and share: encoded text. No plan names them, each is made once.

Their key covers contents alone (what was read, with which tokenizer, in which format), so trainings, evaluations and
sweeps that read the same find the same. They may be removed at any time: who needs one makes it again.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxchat.errors import StoreError
from mlxchat.store import attempts as attempt_log
from mlxchat.store import locks
from mlxchat.store.crash import crash_point
from mlxchat.store.files import now
from mlxchat.store.fingerprint import compute_key
from mlxchat.store.manifest import SCHEMA, SHARED_KIND, Manifest
from mlxchat.store.store import Store


@dataclass(frozen=True, kw_only=True)
class SharedArtifacts:
    """The store as a stage sees it: a place to find and leave what others can use. Any thread may call."""

    outputs: Path
    """The outputs folder."""
    run: str
    """Name of the run, for the manifest and for processes that wait."""
    inputs: dict[str, Manifest]
    """Role → what manifests record of the asking step's input: lineage, no identity."""
    facts: Callable[[], dict[str, Any]]
    """Returns what is recorded of code, versions and machine."""
    say: Callable[[str], None]
    """Where lines for people go."""

    def obtain(
        self,
        *,
        version: int,
        label: str,
        identity: dict[str, Any],
        make: Callable[[Path], dict[str, float]],
        check: Callable[[], None] = lambda: None,
    ) -> Path:
        """Return the folder of the artifact of this identity; make it if the store has none.

        One process makes it, others wait for that one. A killed maker leaves nothing that could be taken for whole.

        Args:
            version: of the format.
            label: for people, in the folder's name.
            identity: contents that it follows from, as plain data.
            make: fills the folder it is given and returns metrics.
            check: called while another process is waited for; it may raise, to wait no longer.

        Raises:
            StoreError: it could not be written.
        """
        key = compute_key(SHARED_KIND, version, identity, {}, {})
        store = Store(self.outputs)  # its own, because a store remembers what it saw
        place = store.find_made(key)
        if place is not None:
            return place

        def tell_waiting(owner: dict[str, Any]) -> None:
            check()
            who = f"process {owner.get('pid', '?')} on {owner.get('host', '?')}"
            self.say(f"{SHARED_KIND:<10} waits: {who} is making {label}")

        with locks.hold(store.lock(key), {"run": self.run, "step": SHARED_KIND}, tell_waiting, check):
            crash_point("shared.locked")
            store.forget()
            place = store.find_made(key)
            if place is not None:
                return place
            work = store.work(key)
            shutil.rmtree(work / "out", ignore_errors=True)
            (work / "out").mkdir(parents=True)
            try:
                attempt = attempt_log.start(work, self.run, SHARED_KIND)
                began = time.monotonic()
                metrics = make(work / "out")
                crash_point("shared.made")
                seconds = time.monotonic() - began
                attempt_log.finish(work, attempt, "done", None, None)
                manifest = {
                    "schema": SCHEMA, "key": key, "version": version, "stage": SHARED_KIND,
                    "step": SHARED_KIND, "kind": SHARED_KIND, "config": identity, "excluded": {}, "overrides": [],
                    "inputs": self.inputs, "pins": {}, "externals": [],
                    "tokens_per_second": metrics.pop("tokens_per_second", None), "metrics": metrics, "derived": {},
                    "seed": None, "attempts": attempt_log.read(work), "seconds": round(seconds, 3),
                    "peak_memory_bytes": None, "peak_array_bytes": None,
                    "code": {}, **self.facts(), "run": self.run, "published": now(),
                }  # fmt: skip
                place = store.publish(work / "out", label, manifest)
                crash_point("shared.published")
                return place
            except OSError as error:
                raise StoreError(
                    f"{label} could not be encoded ({error.strerror or error}: {error.filename or work}). "
                    "Mend that and run the same command again."
                ) from error
            finally:
                shutil.rmtree(work, ignore_errors=True)
