"""Artifacts that stages create on demand and share: encoded text.

They are not steps of a plan. Their key is made of contents only (text, tokenizer, format), so trainings, evaluations
and sweeps share them. They may be removed at any time and are then recomputed.
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
    """A stage's access to shared artifacts. Thread-safe."""

    outputs: Path
    run: str  # its name, for the manifest and for waiting processes
    inputs: dict[str, Manifest]  # role → record of the step's input: lineage, not identity
    facts: Callable[[], dict[str, Any]]  # returns code, versions and machine for the manifest
    say: Callable[[str], None]  # prints a line

    def obtain(
        self,
        *,
        version: int,
        label: str,
        identity: dict[str, Any],
        make: Callable[[Path], dict[str, float]],
        check: Callable[[], None] = lambda: None,
    ) -> Path:
        """Return the folder of the artifact with this identity; create it if the store has none.

        One process creates it, the others wait for it. A killed process leaves no partial artifact.

        Args:
            version: of the format.
            label: readable part of the folder's name.
            identity: the contents that determine it, as plain data.
            make: fills the folder it is given and returns metrics.
            check: called while waiting for another process; it may raise to stop waiting.
        """
        key = compute_key(SHARED_KIND, version, identity, {}, {})
        store = Store(self.outputs)  # a new one, because stores cache their listing
        place = store.find_made(key)
        if place is not None:
            return place

        def tell_waiting(owner: dict[str, Any]) -> None:
            check()
            self.say(f"{SHARED_KIND:<10} waiting: {locks.name_process(owner)} is encoding {label}")

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
                    "Fix that and run the same command again."
                ) from error
            finally:
                shutil.rmtree(work, ignore_errors=True)
