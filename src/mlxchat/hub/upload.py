"""A folder becomes the contents of a model repository of the Hub: in one commit, or not at all."""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from mlxchat.config.wording import format_bytes, format_seconds
from mlxchat.errors import ConfigError, PassingError, StoreError, filter_logs, visible
from mlxchat.hub.downloads import open_url, read_answer, within
from mlxchat.hub.remote import Place, short_of
from mlxchat.store.manifest import MANIFEST, find_damage, read_manifest

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_PROBE_SECONDS = 20.0
# While an upload lasts a line comes as often as this. One by Xet may take a while, and longer the larger it is.
_LINE_SECONDS = 30.0
_LEAST_SECONDS, _LEAST_BYTES_PER_SECOND = 600.0, 50_000
# Former weights of these kinds go with the commit: loaders take every file of such a name for the model's.
_FORMER = (
    "model*.safetensors", "model*.safetensors.index.json", "model_*.pt", "meta_*.json", "adapters.safetensors",
    "adapter_config.json",
)  # fmt: skip


def check_repository(name: str, *, public: bool, kind: str = "model", option: str = "--hub ") -> str:
    """Return the token for an upload to a repository.

    Args:
        name: of the repository.
        public: whether it may be seen by everybody.
        kind: model or dataset.
        option: how the user named it, for messages.

    Raises:
        ConfigError: the name is none, the environment holds no token, or the repository is public and must not be.
        PassingError: the Hub does not answer as it should.
    """
    if not _REPOSITORY.fullmatch(name):
        raise ConfigError(f'{option}"{name}" is no repository: expected ORGANISATION/NAME, or your name in front')
    token = next((value for key in _TOKENS if (value := os.environ.get(key, "").strip())), None)
    if token is None:
        raise ConfigError(
            f"{option.strip() or name} needs a token that may write: set HF_TOKEN in the environment (https://huggingface.co/settings/tokens)"
        )
    from huggingface_hub.errors import RepositoryNotFoundError

    with _told(name):
        api = _api(token)
        try:
            there = api.repo_info(name, repo_type=kind)
        except RepositoryNotFoundError:
            return token
    if not there.private and not public:
        raise ConfigError(f"{name} is there and everybody sees it. Add --public if that is meant, or name another one")
    return token


def push_folder(folder: Path, name: str, token: str, *, message: str, public: bool) -> str:
    """Upload a folder's files in one commit and return the commit's address.

    The repository is made if there is none. If the upload fails, it holds what it held before; one that was made for it
    stays, empty.

    Args:
        folder: its files, in folders or not.
        name: of the repository.
        token: as `check_repository` returns it.
        message: of the commit.
        public: whether a repository that is made may be seen by everybody.

    Raises:
        ConfigError: the token may not write there.
        PassingError: the Hub does not answer as it should.
    """
    with _told(name):
        api = _api(token)
        api.create_repo(name, private=not public, repo_type="model", exist_ok=True)
        with _bounded(api, name, "model", [path for path in folder.rglob("*") if path.is_file()]):
            info = api.upload_folder(
                repo_id=name, folder_path=folder, repo_type="model", commit_message=message,
                delete_patterns=list(_FORMER),
            )  # fmt: skip
        return str(info.commit_url)


def push_artifacts(place: Place, folders: Sequence[Path], *, public: bool) -> int:
    """Upload artifacts to hf://[datasets/]ORGANISATION/NAME/PATH in one commit; return how many were not there yet.

    The repository is made if there is none. Large files that arrived are not sent again when the commit is tried again.

    Args:
        place: where to.
        folders: the closure of what is to be exported.
        public: whether a repository that everybody sees may be written, or is made.

    Raises:
        ConfigError: the place is none, or the token may not write there.
        PassingError: the Hub does not answer as it should.
        StoreError: an artifact here is not what was published.
    """
    from huggingface_hub import CommitOperationAdd

    parts = place.root.strip("/").split("/")
    kind = {"datasets": "dataset", "models": "model"}.get(parts[0])
    name, rest = "/".join(parts[1:3] if kind else parts[:2]), parts[3:] if kind else parts[2:]
    kind = kind or "model"
    token = check_repository(name, public=public, kind=kind, option="hf://")
    with _told(name):
        api = _api(token)
        api.create_repo(name, private=not public, repo_type=kind, exist_ok=True)
        there = set(api.list_repo_files(name, repo_type=kind))
        missing = [folder for folder in folders if "/".join((*rest, "store", folder.name, MANIFEST)) not in there]
    operations = []
    for folder in missing:
        if damage := list(find_damage(folder, read_manifest(folder))):
            raise StoreError(f"{folder.name} is not what was published: {damage[0]}. Nothing was sent")
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            where = "/".join((*rest, "store", folder.name, path.relative_to(folder).as_posix()))
            operations.append(CommitOperationAdd(where, str(path)))
    if operations:
        with _told(name):
            message = f"{missing[-1].name} from mlxchat, with {len(missing) - 1} artifacts that it was made from"
            with _bounded(api, name, kind, [Path(str(each.path_or_fileobj)) for each in operations]):
                api.create_commit(name, operations, commit_message=message, repo_type=kind)
    return len(missing)


def _api(token: str) -> Any:
    from huggingface_hub import HfApi
    from huggingface_hub.utils.tqdm import disable_progress_bars

    filter_logs()
    if not sys.stderr.isatty():
        disable_progress_bars()
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, token=token)


@contextmanager
def _bounded(api: Any, name: str, kind: str, files: Sequence[Path]) -> Iterator[None]:
    """Print a line while an upload lasts, and end one by Xet after a limit. Xet is left out where it does not work.

    hf_xet tries for minutes without a word where a Hub answers its request for a token with anything but a token
    (stand-ins, mirrors), or where the storage that the token names cannot be reached.
    """
    from huggingface_hub import constants

    num_bytes = sum(file.stat().st_size for file in files)
    limit = _LEAST_SECONDS + num_bytes / _LEAST_BYTES_PER_SECOND
    uses_xet = not constants.HF_HUB_DISABLE_XET and find_spec("hf_xet") is not None
    if uses_xet and (fault := _find_xet_fault(api, name, kind)):
        print(visible(f"note: {api.endpoint} {fault}; files go over plain HTTP"), file=sys.stderr)
        uses_xet = False
    before, constants.HF_HUB_DISABLE_XET = constants.HF_HUB_DISABLE_XET, not uses_xet
    began, ended, late = time.monotonic(), threading.Event(), False

    def watch() -> None:
        nonlocal late
        while not ended.wait(_LINE_SECONDS):
            seconds = time.monotonic() - began
            print(f"  uploads {format_bytes(num_bytes)} to {name}, {format_seconds(seconds)} so far", file=sys.stderr)
            if uses_xet and seconds > limit:
                from huggingface_hub.utils import _xet

                late = True
                cast(Any, _xet).abort_xet_session()
                return

    thread = threading.Thread(target=watch, name="upload-watch", daemon=True)
    thread.start()
    try:
        yield
    except Exception:
        if late:
            raise TimeoutError(
                f"Xet storage did not take {format_bytes(num_bytes)} within {format_seconds(limit)} "
                "(HF_HUB_DISABLE_XET=1 uploads without it)"
            ) from None
        raise
    finally:
        ended.set()
        thread.join()
        constants.HF_HUB_DISABLE_XET = before


def _find_xet_fault(api: Any, name: str, kind: str) -> str:
    """Return why files cannot go to a repository's Xet storage, or an empty string."""
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of its HTTP library
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # exported lazily

    try:
        place = f"{api.endpoint}/api/{kind}s/{name}/xet-write-token/main"
        answer, body = read_answer(place, build_hf_headers(token=api.token), within(_PROBE_SECONDS))
        told = json.loads(body)
        if answer.status_code in (401, 403):
            return ""  # the upload says it better
        if answer.status_code >= 300 or not isinstance(told, dict) or not {"accessToken", "casUrl"} <= told.keys():
            return "has no Xet storage"
    except (HTTPError, OSError, ValueError, RecursionError):
        return "has no Xet storage"
    try:
        with open_url(str(told["casUrl"]), {}, within(_PROBE_SECONDS)):
            pass  # that it answers is enough
    except (HTTPError, OSError, ValueError) as error:
        return f"has Xet storage at {told['casUrl']}, which does not answer ({type(error).__name__})"
    return ""


@contextmanager
def _told(name: str) -> Iterator[None]:
    """Turn what the client raises into one message."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except Exception as error:  # among them those of the HTTP library that the client uses
        status = getattr(error.response, "status_code", None) if isinstance(error, HfHubHTTPError) else None
        if status in (401, 403, 404):
            raise ConfigError(
                f"{name} was not written: the Hub answers {status}. May the token of HF_TOKEN write there?"
            ) from None
        cause = short_of(error.__cause__ or error)
        raise PassingError(f"{name} was not written: {cause}. Nothing was committed; try again") from None
