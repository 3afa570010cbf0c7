"""Locks: one holder per step, by flock, which the kernel releases when the holder dies.

Some network mounts keep flock local to each host, so that two hosts can hold the same lock. One host cannot detect
that, so `claim` decides by the mount's type and options. Such a folder belongs to the host that used it first
(`locks/one-host.json`), until two hosts have tested their locks against each other (`mlxchat doctor --hosts`).
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxchat.config.secrets import redact
from mlxchat.errors import StoreError
from mlxchat.store.files import is_alive, now, write_whole

_POLL_SECONDS = 0.1
# `is_held` takes a lock for an instant; a shorter wait is not reported.
_GLANCE_SECONDS = 0.05
_BUSY = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
# The NVIDIA driver's description of each device on Linux, in PCI bus order.
_NVIDIA = Path("/proc/driver/nvidia/gpus")
# Open lock files of this process: handle → path.
_held: dict[int, Path] = {}


def _close_in_child() -> None:
    """Close inherited locks: a forked child would otherwise keep them after the parent's death."""
    for handle in list(_held):
        with suppress(OSError):
            os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


@contextmanager
def hold(
    path: Path,
    owner: dict[str, Any],
    on_wait: Callable[[dict[str, Any]], None],
    check: Callable[[], None] = lambda: None,
    *,
    shared: bool = False,
) -> Iterator[bool]:
    """Hold the lock file while the body runs; yield whether another process held it first.

    Args:
        path: the lock file; it is created if needed.
        owner: the record that waiting processes see (process id and host are added).
        on_wait: called once, with the holder's record, before waiting; it may raise instead.
        check: called repeatedly while waiting; it may raise to stop waiting.
        shared: take a shared lock, which excludes only exclusive holders. Shared holders leave no record.

    Raises:
        StoreError: the file cannot be created, or its file system has no locks.
    """
    waited = granted = False
    began = time.monotonic()
    handle = _open(path)
    try:
        while not _try_lock(handle, path, shared=shared) or not _is_named(handle, path):
            holder = read_owner(path)
            if not waited and (_may_be_alive(holder) or time.monotonic() - began > _GLANCE_SECONDS):
                on_wait(holder)
                waited = True
            check()
            time.sleep(_POLL_SECONDS if waited else 0.002)
            if not _is_named(handle, path):  # it was removed meanwhile: a lock on it excludes nobody
                _close(handle)
                handle = _open(path)
        granted = True
        if not shared:
            _write_owner(handle, {"pid": os.getpid(), "host": host_name(), **owner})
        yield waited
    finally:
        if handle in _held:  # a forked child has closed it, and the number may mean another file
            if granted and not shared and _is_named(handle, path):  # else the record is another holder's
                _write_owner(handle, None)
            with suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_UN)  # also for children that inherited the handle
            _close(handle)


def owns(path: Path) -> bool:
    """Return whether this process holds the lock and the lock file was not replaced."""
    return any(held == path and _is_named(handle, path) for handle, held in list(_held.items()))


def is_held(path: Path) -> bool:
    """Return whether a live process holds this lock."""
    try:
        handle = os.open(path, os.O_RDWR)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:  # read-only folder
        handle = os.open(path, os.O_RDONLY)
    try:
        return not _try_lock(handle, path, shared=False)
    finally:
        os.close(handle)


def host_name() -> str:
    """Return this machine's name in records."""
    return os.uname().nodename


def gpu_locks() -> dict[str, Path]:
    """Return device → lock file of every GPU that this process may use, in the order to take them.

    The locks are per machine, not per outputs folder.

    Raises:
        StoreError: the folder of these locks belongs to another user.
    """
    # Not $TMPDIR, which differs between shells and jobs.
    folder = Path(os.environ.get("MLXCHAT_LOCKS") or f"/tmp/mlxchat-{os.getuid()}")
    with suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.exists() and folder.lstat().st_uid != os.getuid():
        raise StoreError(
            f"{folder}, the folder of GPU locks, belongs to another user: set MLXCHAT_LOCKS to a folder of yours"
        )
    names = {name: re.sub(r"[^\w.-]", "-", name)[:200] for name in _gpu_names()}
    return {name: folder / f"gpu-{clean}.lock" for name, clean in sorted(names.items())}


def _gpu_names() -> set[str]:
    """Return the devices that SLURM and CUDA allow, as numbers or MIG names; without a restriction, all."""
    records = [path.read_text() for path in sorted(_NVIDIA.glob("*/information"))]
    uuids = [found[1] if (found := re.search(r"GPU UUID:\s*(\S+)", text)) else "" for text in records]
    visible = _split(os.environ.get("CUDA_VISIBLE_DEVICES"))
    job = _split(os.environ.get("SLURM_JOB_GPUS"))
    # In a job CUDA may number the job's devices from 0; SLURM's numbers are the machine's.
    chosen = visible if visible and set(visible) <= set(job or visible) else job
    if chosen is None:
        return {str(number) for number in range(len(uuids) or 1)}
    # CUDA also accepts prefixes of UUIDs.
    numbers = {name: str(at) for name in chosen for at, uuid in enumerate(uuids) if name and uuid.startswith(name)}
    return {numbers.get(name, name) for name in chosen}


def _split(text: str | None) -> list[str] | None:
    """Return the items of a comma-separated list, or None if it is empty."""
    return [name for item in text.split(",") if (name := item.strip())] or None if text else None


def name_process(owner: Mapping[str, Any]) -> str:
    """Return the process in a holder's record, for messages."""
    return f"process {owner['pid']} on {owner['host']}" if {"pid", "host"} <= owner.keys() else "another process"


def read_owner(path: Path) -> dict[str, Any]:
    """Return the holder's record, or an empty one."""
    try:
        record = json.loads(path.read_text() or "{}")
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def check_locks(folder: Path) -> None:
    """Check that locks work in a folder.

    Raises:
        StoreError: its file system has no locks, or grants the same one twice, as some network mounts do.
    """
    path = folder / f".probe-{os.urandom(8).hex()}"
    handles = [os.open(path, os.O_RDWR | os.O_CREAT, 0o644), os.open(path, os.O_RDWR)]
    try:
        granted = [_try_lock(handle, path, shared=False) for handle in handles]
    finally:
        for handle in handles:
            os.close(handle)
        path.unlink()
    if granted != [True, False]:
        raise StoreError(
            f"{folder}: this file system grants a lock to two holders at once, so two runs could run the same step. "
            "Choose another folder: outputs=PATH"
        )


def _open(path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)  # Python's files are closed on exec
    except OSError as error:
        raise StoreError(f"lock file {path} cannot be created ({error.strerror})") from None
    _held[handle] = path
    return handle


def _close(handle: int) -> None:
    del _held[handle]
    os.close(handle)


def _is_named(handle: int, path: Path) -> bool:
    """Return whether the open file is still the one at this path."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except OSError:
        return False


def _may_be_alive(holder: dict[str, Any]) -> bool:
    """Return whether a record's process may hold the lock; records of dead processes stay in the file."""
    if not holder:
        return False
    if holder.get("host") != host_name():
        return True
    try:
        return is_alive(int(holder["pid"]))
    except (KeyError, ValueError, TypeError):
        return True


def _write_owner(handle: int, record: dict[str, Any] | None) -> None:
    with suppress(OSError):  # full disk: the record is only for messages
        os.ftruncate(handle, 0)
        if record is not None:
            os.pwrite(handle, json.dumps(redact(record)).encode(), 0)


def _try_lock(handle: int, path: Path, *, shared: bool) -> bool:
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _BUSY:
            return False
        raise StoreError(
            f"{path}: this file system has no locks ({error.strerror}). Choose another folder: outputs=PATH"
        ) from None
    return True


CLAIM = "one-host.json"
TESTED = "hosts.json"
# Local disks, and folders that a virtual machine shares with its host: no other machine mounts them.
_LOCAL = (
    *("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "bcachefs", "reiserfs", "jfs", "ntfs", "ntfs3", "vfat"),
    *("exfat", "msdos", "tmpfs", "ramfs", "overlay", "aufs", "squashfs", "erofs", "apfs", "hfs", "ufs", "devtmpfs"),
    *("fuseblk", "fuse.fuse-overlayfs", "rootfs", "virtiofs", "9p", "fakeowner", "fuse.grpcfuse", "vboxsf"),
)
# Locks are kept by a server or the cluster.
_SHARED = ("ceph", "fuse.ceph", "fuse.ceph-fuse", "gpfs", "fuse.glusterfs", "ocfs2", "gfs2", "fuse.juicefs", "panfs")
# Type → options that keep locks local to the host.
_OPTIONS = {
    "nfs": ("nolock", "local_lock=all", "local_lock=flock", "locallocks"),
    "nfs4": ("nolock", "local_lock=all", "local_lock=flock", "locallocks"),
    "cifs": ("nobrl",),
    "smb3": ("nobrl",),
    "lustre": ("localflock",),
}


@dataclass(frozen=True)
class Mount:
    """A mounted file system."""

    kind: str
    """Type in the terms of mount(8): ext4, nfs4, fuse.sshfs."""
    source: str
    options: tuple[str, ...]

    @property
    def is_local(self) -> bool:
        """Whether only this machine uses it."""
        return self.kind in _LOCAL

    def hides_locks(self) -> str | None:
        """Return why other hosts may not see locks taken here; None if they do, or if it is local."""
        if self.is_local or self.kind in _SHARED:
            return None
        if self.kind in _OPTIONS:
            found = [option for option in _OPTIONS[self.kind] if option in self.options]
            if found:
                return f"it is {self.kind} mounted with {found[0]}, which keeps locks local to each host"
            if self.kind == "lustre" and "flock" not in self.options:
                return "it is lustre mounted without flock"
            return None
        return f"it is {self.kind or 'of an unknown type'}, and whether hosts see each other's locks there is not known"


def mount_of(folder: Path) -> Mount:
    """Return the mount of a folder, or of its nearest existing parent; local if unknown."""
    place = folder.resolve()
    while not place.exists() and place != place.parent:
        place = place.parent
    best, found = "", Mount("ext4", "", ())
    for point, mount in _mounts():
        inside = str(place) == point or str(place).startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, found = point, mount
    return found


def _mounts() -> list[tuple[str, Mount]]:
    """Return (mount point, mount) of everything mounted; later ones shadow earlier ones."""
    found = []
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        import psutil  # macOS

        for part in psutil.disk_partitions(all=True):
            found.append((part.mountpoint, Mount(part.fstype, part.device, tuple(part.opts.split(",")))))
        return found
    for line in lines:
        fields, _, rest = line.partition(" - ")
        kind, source, options = [*rest.split(" "), "", ""][:3]
        point = re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), fields.split(" ")[4])
        every = tuple(dict.fromkeys([*fields.split(" ")[5].split(","), *options.split(",")]))
        found.append((point, Mount(kind, source, every)))
    return found


def claim(folder: Path) -> None:
    """Claim `locks/` of an outputs folder for this host if hosts may not see each other's locks there.

    Raises:
        StoreError: another host uses the folder.
    """
    mount = mount_of(folder)
    reason = mount.hides_locks()
    if reason is None or _is_tested(folder, mount):
        return
    path, here = folder / CLAIM, host_name()
    record = {"host": here, "since": now(), "mount": mount.kind, "source": mount.source}
    with suppress(FileExistsError), path.open("x", encoding="utf-8") as file:
        file.write(json.dumps(record))
        return
    for _ in range(20):  # it may be being written
        if (owner := read_owner(path)) or not path.exists():
            break
        time.sleep(0.05)
    if "host" not in owner:
        if not path.exists():  # two hosts have just finished a test
            claim(folder)
            return
        raise StoreError(
            f"{path} does not name the host that uses this outputs folder, because its writer was killed. If no other "
            "host uses the folder, remove the file"
        )
    if owner["host"] != here:
        since, other = owner.get("since", "a while"), owner["host"]
        raise StoreError(
            f"{folder.parent}: {reason}. {other} uses this outputs folder since {since}, and {here} may not see its "
            "locks, so both could run the same step. Test it: run "
            f"mlxchat doctor --hosts outputs={folder.parent} on both at the same time; a successful test is recorded. "
            f"If {other} no longer uses the folder, remove {path}. "
            "Or mount it so that locks are shared (NFS: without nolock and local_lock)"
        )


def check_links(refs: Path) -> None:
    """Check that symlinks in the writable folder `refs` can be read back, because gc keeps what they lead to.

    Raises:
        StoreError: this file system has no symlinks, or none that lead out of their folder.
    """
    link = refs / f".probe-{os.urandom(8).hex()}"
    try:
        link.symlink_to("../store")
        right = str(link.readlink()) == "../store"
    except OSError:
        right = False
    finally:
        link.unlink(missing_ok=True)
    if not right:
        raise StoreError(
            f"{refs}: this file system ({mount_of(refs).kind}) has no symbolic links to a neighbouring folder, which "
            "refs/ needs. Choose another folder: outputs=PATH. "
            "For sshfs: mount it with -o no_contain_symlinks"
        )


def remember_tested(folder: Path, hosts: list[str]) -> None:
    """Record that hosts saw each other's locks in a folder with this type of mount."""
    mount = mount_of(folder)
    own = folder / f"{TESTED}.{host_name()}"  # both hosts write at the same time
    write_whole(own, json.dumps({"hosts": hosts, "at": now(), "mount": mount.kind}).encode())
    own.replace(folder / TESTED)
    (folder / CLAIM).unlink(missing_ok=True)


def _is_tested(folder: Path, mount: Mount) -> bool:
    return bool(read_owner(folder / TESTED).get("mount") == mount.kind)
