"""What a folder lies on, and who sees its locks: this machine alone, or every host that mounts it.

The runner relies on flock. Some network mounts keep it to each host: locks work there, and two hosts hold the same one.
No test on one host can tell, so it goes by what is mounted. Such a folder belongs to the host that used it first
(`locks/one-host.json`), until two hosts have tried their locks against each other (`mlxchat doctor --hosts`).
"""

from __future__ import annotations

import json
import os
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxchat.errors import StoreError
from mlxchat.store import locks
from mlxchat.store.records import now
from mlxchat.store.sealed import write_whole

CLAIM = "one-host.json"
TESTED = "hosts.json"
# Disks of one machine, and folders that a virtual machine has of its host: nobody else mounts them.
_LOCAL = (
    *("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "bcachefs", "reiserfs", "jfs", "ntfs", "ntfs3", "vfat"),
    *("exfat", "msdos", "tmpfs", "ramfs", "overlay", "aufs", "squashfs", "erofs", "apfs", "hfs", "ufs", "devtmpfs"),
    *("fuseblk", "fuse.fuse-overlayfs", "rootfs", "virtiofs", "9p", "fakeowner", "fuse.grpcfuse", "vboxsf"),
)
# Their locks are those of a server or of the cluster.
_SHARED = ("ceph", "fuse.ceph", "fuse.ceph-fuse", "gpfs", "fuse.glusterfs", "ocfs2", "gfs2", "fuse.juicefs", "panfs")
# Type → option that keeps locks to the host.
_OPTIONS = {
    "nfs": ("nolock", "local_lock=all", "local_lock=flock", "locallocks"),
    "nfs4": ("nolock", "local_lock=all", "local_lock=flock", "locallocks"),
    "cifs": ("nobrl",),
    "smb3": ("nobrl",),
    "lustre": ("localflock",),
}
# Type → option without which they do.
_NEEDED = {"lustre": "flock"}


@dataclass(frozen=True)
class Mount:
    """What a folder lies on."""

    kind: str
    """As mount(8) calls it: ext4, nfs4, fuse.sshfs."""
    source: str
    options: tuple[str, ...]

    @property
    def is_local(self) -> bool:
        """Tell whether only this machine uses it."""
        return self.kind in _LOCAL

    def hides_locks(self) -> str | None:
        """Return why other hosts may not see locks that are taken here; None if they do, or there are no others."""
        if self.is_local or self.kind in _SHARED:
            return None
        if self.kind in _OPTIONS:
            found = [option for option in _OPTIONS[self.kind] if option in self.options]
            if found:
                return f"it is {self.kind} mounted with {found[0]}, which keeps locks to each host"
            needed = _NEEDED.get(self.kind)
            if needed is not None and needed not in self.options:
                return f"it is {self.kind} mounted without {needed}"
            return None
        return f"it is {self.kind or 'of an unknown kind'}, of which it is not known that hosts see each other's locks"


def mount_of(folder: Path) -> Mount:
    """Return what a folder, or the nearest one above it that is there, lies on; unknown is local."""
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
    """Return (mount point, what it is) of everything that is mounted, later ones over earlier ones."""
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
    """Make sure that no other host uses a folder of locks that it would not see.

    Args:
        folder: `locks/` of an outputs folder, which is there and can be written.

    Raises:
        StoreError: another host was here first.
    """
    mount = mount_of(folder)
    reason = mount.hides_locks()
    if reason is None or _is_tested(folder, mount):
        return
    path, here = folder / CLAIM, locks.host_name()
    record = {"host": here, "since": now(), "mount": mount.kind, "source": mount.source}
    with suppress(FileExistsError), path.open("x", encoding="utf-8") as file:
        file.write(json.dumps(record))
        return
    owner = _read(path)
    if "host" not in owner:
        if not path.exists():  # two hosts have just tested it
            claim(folder)
            return
        raise StoreError(
            f"{path} does not say which host uses this outputs folder: whoever wrote it was ended. If no other "
            "one uses it, remove the file"
        )
    if owner["host"] != here:
        since, other = owner.get("since", "a while"), owner["host"]
        raise StoreError(
            f"{folder.parent}: {reason}. Since {since} {other} uses this outputs folder, and {here} would not see its "
            "locks, so that both could make the same step. "
            f"Run mlxchat doctor --hosts outputs={folder.parent} on both at once: if they do see each other's locks, "
            f"that is remembered. If {other} does not use it any more, remove {path}. "
            "Or mount it so that locks are shared (NFS: without nolock and local_lock)"
        )


def check_links(refs: Path) -> None:
    """Make sure that names for people can be read back, since what they lead to is what gc keeps.

    Args:
        refs: the folder of the names, which is there and can be written.

    Raises:
        StoreError: this file system has no symbolic links, or none that lead out of their folder.
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
            f"{refs}: this file system ({mount_of(refs).kind}) has no symbolic links that lead to a neighbouring "
            "folder, and refs/ are such. Choose another folder: outputs=PATH. "
            "For sshfs: mount it with -o no_contain_symlinks"
        )


def remember_tested(folder: Path, hosts: list[str]) -> None:
    """Keep that hosts saw each other's locks in a folder, as it is mounted here."""
    mount = mount_of(folder)
    own = folder / f"{TESTED}.{locks.host_name()}"  # both hosts come here at the same moment
    write_whole(own, json.dumps({"hosts": hosts, "at": now(), "mount": mount.kind}).encode())
    own.replace(folder / TESTED)
    (folder / CLAIM).unlink(missing_ok=True)


def _is_tested(folder: Path, mount: Mount) -> bool:
    return _read(folder / TESTED, patient=False).get("mount") == mount.kind


def _read(path: Path, *, patient: bool = True) -> dict[str, Any]:
    """Return a record; one that is being written is waited for."""
    for _ in range(20 if patient else 1):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError):
            time.sleep(0.05)
            continue
        return record if isinstance(record, dict) else {}
    return {}
