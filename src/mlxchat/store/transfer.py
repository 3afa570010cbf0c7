"""Export and import of artifacts, with all their inputs, between outputs folders.

An exported folder has the layout `store/<artifact>/…` of outputs folders, so it can be synchronised by rsync, or be
one. A tar has the same paths. Imported artifacts are unpacked under work/, hashed against their manifests and renamed
into store/, inputs first, so that a store never holds an artifact without its inputs.
"""

from __future__ import annotations

import shutil
import sys
import tarfile
from collections.abc import Iterator
from datetime import datetime
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import IO, Any

from mlxchat.config.wording import format_bytes
from mlxchat.errors import StoreError
from mlxchat.store import locks
from mlxchat.store.catalog import references
from mlxchat.store.crash import crash_point
from mlxchat.store.files import list_folder, sync, whole_file
from mlxchat.store.manifest import MANIFEST, SHARED_KIND, is_plain, read_manifest
from mlxchat.store.store import Store
from mlxchat.store.verify import check_contents

_TARS: dict[str, Any] = {".tar": "w", ".tgz": "w:gz", ".gz": "w:gz", ".xz": "w:xz"}
_MOST_HEADER_BYTES = 1 << 20  # name, link and attributes of a member
_ROOM_BYTES = 256 << 20  # left free on the disk


class _Member(tarfile.TarInfo):
    """A member that refuses large headers instead of reading them into memory."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        if self.size > _MOST_HEADER_BYTES and self.type not in tarfile.REGULAR_TYPES:
            raise tarfile.ReadError(f"a header has {self.size:,} bytes")
        found: tarfile.TarInfo = super()._proc_member(tar)  # type: ignore[misc]  # a private hook of tarfile
        return found


def closure(store: Store, folders: list[Path], elsewhere: Store | None = None) -> list[Path]:
    """Return artifacts and all their inputs, inputs first.

    Args:
        store: holds them.
        folders: the artifacts.
        elsewhere: a store that may hold inputs that `store` lacks; these are omitted.

    Raises:
        StoreError: an input is missing, or (forged) manifests are inputs of each other.
    """
    inputs: dict[Path, list[Path]] = {}
    missing = []
    queue = list(folders)
    while queue:
        if (folder := queue.pop(0)) in inputs:
            continue
        inputs[folder] = []
        for rid in references(read_manifest(folder)):
            if (place := store.find(rid)) is not None:
                inputs[folder].append(place)
            elif elsewhere is None or elsewhere.find(rid) is None:
                where = (elsewhere or store).outputs
                missing.append(f"{folder.name} was made from {rid[:16]}, which is not in {where}")
        queue += inputs[folder]
    if missing:
        raise StoreError("\n".join(missing))
    try:
        return list(TopologicalSorter(inputs).static_order())
    except CycleError as error:
        names = ", ".join(folder.name for folder in error.args[1])
        raise StoreError(f"the manifests of these artifacts name each other as inputs: {names}") from None


def is_tar(path: Path) -> bool:
    """Return whether a path names a tar file rather than a folder."""
    return path.suffix in _TARS and not path.is_dir()


def is_url(place: str) -> bool:
    """Return whether a place is a URL rather than a path."""
    scheme, mark, _ = place.partition("://")
    return bool(mark) and scheme.replace("+", "").isalnum()


def export(store: Store, folders: list[Path], to: Path) -> int:
    """Copy artifacts to a folder or a tar file; return the number of copied ones.

    Raises:
        StoreError: it cannot be written.
    """
    try:
        if is_tar(to):
            to.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(to) as unfinished, tarfile.open(unfinished, _TARS[to.suffix]) as tar:
                for folder in folders:
                    for path in _files(folder):
                        tar.add(path, f"store/{folder.name}/{path.relative_to(folder)}", recursive=False)
            return len(folders)
        copied = 0
        for folder in folders:
            place = to / "store" / folder.name
            if (place / MANIFEST).exists():
                continue
            temporary = to / ".export" / folder.name
            shutil.rmtree(temporary, ignore_errors=True)
            for path in _files(folder):
                target = temporary / path.relative_to(folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
                sync(target)
            place.parent.mkdir(parents=True, exist_ok=True)
            temporary.rename(place)
            copied += 1
        shutil.rmtree(to / ".export", ignore_errors=True)
        return copied
    except OSError as error:
        raise StoreError(f"{to} cannot be written ({error.strerror or error})") from error


def import_all(store: Store, source: Path) -> tuple[list[Path], list[Path]]:
    """Import every artifact of an exported folder or tar file; return the new ones, and those that the store had.

    Raises:
        StoreError: the source does not exist, a file differs from its manifest or leads out of its folder, or an
            artifact lacks an input. Nothing faulty reaches the store.
    """
    if not source.exists():
        raise StoreError(f"{source} does not exist")
    store.prepare()
    base = store.outputs / "work" / ".import"
    with locks.hold(store.outputs / "locks" / "import.lock", {"step": "import"}, tell_waiting):
        shutil.rmtree(base, ignore_errors=True)
        base.mkdir(parents=True)
        try:
            _unpack(source, base)
            return take_in(store, base / "store")
        except OSError as error:
            raise StoreError(f"{source} cannot be imported ({error.strerror or error})") from error
        finally:
            shutil.rmtree(base, ignore_errors=True)


def tell_waiting(owner: dict[str, Any]) -> None:
    """Print which process holds the lock of imports."""
    print(f"waiting for the import of {locks.name_process(owner)}", file=sys.stderr, flush=True)


def take_in(store: Store, incoming: Path) -> tuple[list[Path], list[Path]]:
    """Verify unpacked artifacts and rename them into the store; the caller holds `import.lock`.

    Args:
        store: the target.
        incoming: folder of the artifacts, on the store's file system; new ones are moved out of it.

    Returns:
        the new ones, and those that the store had.

    Raises:
        StoreError: one differs from its manifest or lacks an input; none was imported.
    """
    staged = Store(incoming.parent)
    folders = [incoming / name for name in list_folder(incoming)]
    if not folders:
        raise StoreError("it holds no artifacts: expected store/<artifact>/manifest.json or <artifact>/manifest.json")
    faults = [f"{folder.name}: {fault}" for folder in folders for fault in check_contents(folder)]
    if faults:
        raise StoreError("nothing was imported:\n" + "\n".join(faults))
    try:
        ordered = closure(staged, folders, elsewhere=store)
    except StoreError as error:
        raise StoreError(f"nothing was imported:\n{error}") from None
    crash_point("import.checked")
    new, known = [], []
    with locks.hold(store.outputs / "locks" / "gc.lock", {"step": "import"}, lambda owner: None, shared=True):
        for folder in ordered:
            manifest = read_manifest(folder)
            rid = manifest["rid"]
            with locks.hold(store.lock(rid), {"step": "import"}, lambda owner: None):
                store.forget()
                store.learn(manifest)
                here = store.find(rid)
                if here is not None:
                    known.append(here)
                    continue
                place = store.outputs / "store" / folder.name
                folder.rename(place)
                sync(place.parent)
                crash_point("import.renamed")
                new.append(place)
        group = f"imported-{datetime.now():%Y%m%d-%H%M%S}"
        steps: dict[str, Path] = {}
        for place in [*new, *known] if new else []:
            manifest = read_manifest(place)
            if manifest.get("kind") != SHARED_KIND:  # gc keeps encoded text with its source
                step = str(manifest.get("step"))
                steps[place.name if step in steps else step] = place
        for step, place in steps.items():
            store.set_ref(group, step, place)
    store.forget()
    return new, known


def _unpack(source: Path, base: Path) -> None:
    """Copy the files of a folder or a tar file to base/store/<artifact>/.

    Raises:
        StoreError: a path leads elsewhere, an entry is not a regular file, or the disk is full.
    """
    try:
        for name, size, content in _files_in_tar(source) if source.is_file() else _files_below(source):
            if size + _ROOM_BYTES > (free := shutil.disk_usage(base).free):
                raise StoreError(
                    f"{source} holds {name} with {format_bytes(size)}, but {base.parent.parent} has "
                    f"{format_bytes(free)} free"
                )
            target = base / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with content, target.open("xb") as file:
                shutil.copyfileobj(content, file)
            sync(target)
            if name.endswith(f"/{MANIFEST}") and name.count("/") == 2:
                crash_point("import.unpacked")
    except (tarfile.TarError, EOFError) as error:
        raise StoreError(f"{source} is not a readable tar file ({error})") from None
    except FileExistsError as error:
        raise StoreError(f"{source} holds {error.filename} twice: nothing was imported") from None


def _files_below(source: Path) -> Iterator[tuple[str, int, IO[bytes]]]:
    """Yield name, size and open file of the artifacts' files in a folder or its `store`."""
    found = source / "store" if (source / "store").is_dir() else source
    for folder in list_folder(found):
        for path in sorted((found / folder).rglob("*")) if (found / folder / MANIFEST).exists() else ():
            if path.is_symlink():
                raise StoreError(f"{path} is a symlink; only regular files are imported")
            if path.is_file():
                yield f"store/{path.relative_to(found)}", path.stat().st_size, path.open("rb")


def _files_in_tar(source: Path) -> Iterator[tuple[str, int, IO[bytes]]]:
    """Yield name, size and open file of the members of a tar file."""
    with tarfile.open(source, tarinfo=_Member) as tar:
        for member in tar:
            name = member.name.removeprefix("./").rstrip("/")
            if member.isdir():
                continue
            plain = member.isfile() and not member.issparse()
            if not plain or not is_plain(name) or not name.startswith("store/") or name.count("/") < 2:
                raise StoreError(
                    f'{source} holds "{member.name}", which is not a file of an artifact: nothing was imported'
                )
            content = tar.extractfile(member)
            assert content is not None
            yield name, member.size, content


def _files(folder: Path) -> Iterator[Path]:
    """Yield an artifact's files, the manifest last, so that an incomplete copy has none."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    yield from (path for path in files if path != folder / MANIFEST)
    yield folder / MANIFEST
