"""Outputs folders on network mounts: the mount decides which hosts may use them; two machines can test their locks."""

import fcntl
import json
import os
import threading
from pathlib import Path

import pytest

from mlxchat.errors import StoreError
from mlxchat.store import locks
from mlxchat.store.gc import Limits, collect
from mlxchat.store.locks import Mount, check_links, claim, mount_of, remember_tested
from mlxchat.store.probing import probe_folder, probe_hosts
from mlxchat.store.store import Store

NFS = Mount("nfs4", "server:/data", ("rw", "relatime", "vers=4.2", "local_lock=none"))
SSHFS = Mount("fuse.sshfs", "server:/data", ("rw",))


@pytest.mark.parametrize(
    ("mount", "message"),
    [
        (Mount("ext4", "/dev/sda1", ("rw",)), None),
        (Mount("overlay", "overlay", ("rw",)), None),
        (NFS, None),
        (Mount("nfs", "s:/d", ("rw", "vers=3", "nolock", "local_lock=all")), "nolock"),
        (Mount("nfs", "s:/d", ("rw", "vers=3", "local_lock=flock")), "local_lock=flock"),
        (Mount("nfs4", "s:/d", ("rw", "local_lock=posix")), None),
        (Mount("cifs", "//s/d", ("rw", "nobrl")), "nobrl"),
        (Mount("cifs", "//s/d", ("rw",)), None),
        (Mount("lustre", "s:/d", ("rw", "flock")), None),
        (Mount("lustre", "s:/d", ("rw", "localflock")), "localflock"),
        (Mount("lustre", "s:/d", ("rw",)), "without flock"),
        (Mount("ceph", "s:/", ("rw",)), None),
        (SSHFS, "not known"),
        (Mount("beegfs", "beegfs_nodev", ("rw",)), "not known"),
    ],
)
def test_mount_decides_whether_hosts_share_locks(mount, message):
    reason = mount.hides_locks()
    assert reason is None if message is None else message in (reason or "")


def test_innermost_and_last_mount_counts(monkeypatch, tmp_path):
    table = tmp_path / "mountinfo"
    inner = str(tmp_path / "a b")
    (tmp_path / "a b").mkdir()
    lines = [
        "20 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw,discard",
        f"30 20 0:40 / {tmp_path} rw - nfs4 server:/data rw,local_lock=none",
        f"31 30 0:41 / {inner.replace(' ', chr(92) + '040')} rw - fuse.sshfs host:/x rw,user_id=0",
        f"32 20 0:42 / {tmp_path}x rw - tmpfs tmpfs rw",
    ]
    table.write_text("\n".join(lines) + "\n")
    original = Path.read_text
    monkeypatch.setattr(
        Path, "read_text",
        lambda self, **options: original(table if str(self) == "/proc/self/mountinfo" else self, **options),
    )  # fmt: skip
    assert mount_of(tmp_path / "outputs" / "not there yet").kind == "nfs4"
    assert mount_of(tmp_path / "a b" / "outputs").kind == "fuse.sshfs"
    assert mount_of(Path("/")).options == ("rw", "relatime", "discard")


def on(monkeypatch: pytest.MonkeyPatch, mount: Mount, host: str) -> None:
    monkeypatch.setattr(locks, "mount_of", lambda folder: mount)
    monkeypatch.setattr(locks, "host_name", lambda: host)


def test_unshared_locks_bind_a_folder_to_its_first_host(tmp_path, monkeypatch):
    store = Store(tmp_path / "outputs")
    on(monkeypatch, SSHFS, "one")
    store.prepare()
    store.prepare()
    on(monkeypatch, SSHFS, "two")
    with pytest.raises(StoreError, match=r"fuse\.sshfs.*one uses this outputs folder since .* two may not see its"):
        store.prepare()
    with pytest.raises(StoreError, match="may not see"):
        collect(store, Limits())
    (tmp_path / "outputs" / "locks" / "one-host.json").unlink()
    store.prepare()
    on(monkeypatch, SSHFS, "one")
    with pytest.raises(StoreError, match="two uses this outputs folder"):
        store.prepare()


@pytest.mark.parametrize("mount", [NFS, Mount("ext4", "/dev/sda1", ("rw",))])
def test_shared_locks_allow_several_hosts(mount, tmp_path, monkeypatch):
    for host in ("one", "two"):
        on(monkeypatch, mount, host)
        Store(tmp_path / "outputs").prepare()
    assert list((tmp_path / "outputs" / "locks").iterdir()) == []


def test_one_of_two_simultaneous_claims_wins(tmp_path, monkeypatch):
    (tmp_path / "one-host.json").touch()  # the other host has created the file and is writing it
    on(monkeypatch, SSHFS, "two")
    written = json.dumps({"host": "one", "since": "now"})
    timer = threading.Timer(0.1, lambda: (tmp_path / "one-host.json").write_text(written))
    timer.start()
    with pytest.raises(StoreError, match="one uses this outputs folder"):
        claim(tmp_path)
    timer.join()


def test_tested_hosts_share_a_folder_until_its_mount_changes(tmp_path, monkeypatch):
    beegfs = Mount("beegfs", "x", ())
    on(monkeypatch, beegfs, "one")
    claim(tmp_path)
    remember_tested(tmp_path, ["one", "two"])
    on(monkeypatch, beegfs, "three")
    claim(tmp_path)
    on(monkeypatch, SSHFS, "three")
    claim(tmp_path)
    on(monkeypatch, SSHFS, "one")
    with pytest.raises(StoreError, match="three uses"):
        claim(tmp_path)


def test_unreadable_symlinks_are_refused(tmp_path, monkeypatch):
    store = Store(tmp_path / "outputs")
    store.prepare()

    def refuse(self: Path) -> Path:
        raise PermissionError("Operation not permitted")  # as sshfs does for links to parent folders

    monkeypatch.setattr(Path, "readlink", refuse)
    for act in (store.prepare, lambda: collect(store, Limits()), lambda: check_links(store.outputs / "refs")):
        with pytest.raises(StoreError, match=r"no symbolic links.*no_contain_symlinks"):
            act()
    assert list((store.outputs / "refs").iterdir()) == []


def test_probe_passes_here_finds_broken_locks_and_leaves_nothing(tmp_path, monkeypatch):
    assert [text for mark, text in probe_folder(tmp_path) if mark == "wrong"] == []
    monkeypatch.setattr(fcntl, "flock", lambda handle, operation: None)
    (text,) = (text for mark, text in probe_folder(tmp_path) if mark == "wrong")
    assert "two processes hold the same one at once" in text
    assert list(tmp_path.iterdir()) == []


def meet(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[str, str]]]:
    """Probe from two threads as two hosts: flock excludes open files, so it works between threads."""
    hosts = threading.local()
    monkeypatch.setattr(locks, "host_name", lambda: hosts.name)
    found: list[list[tuple[str, str]]] = [[], []]

    def one(number: int) -> None:
        hosts.name = f"host{number}"
        found[number] += probe_hosts(folder, 10)

    threads = [threading.Thread(target=one, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return found


def test_successful_test_of_two_hosts_is_recorded(tmp_path, monkeypatch):
    for found in meet(tmp_path / "locks", monkeypatch):
        assert [mark for mark, _ in found] == ["ok"], found
        assert "see each other's locks" in found[0][1]
    assert json.loads((tmp_path / "locks" / "hosts.json").read_text())["hosts"] == ["host0", "host1"]
    assert [path.name for path in (tmp_path / "locks").iterdir()] == ["hosts.json"]


def test_hosts_that_hold_the_same_lock_are_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", lambda handle, operation: None)
    for found in meet(tmp_path / "locks", monkeypatch):
        assert found[0][0] == "wrong"
        assert "hold the same lock at once" in found[0][1]
    assert list((tmp_path / "locks").iterdir()) == []


def test_missing_second_host_is_reported(tmp_path):
    ((mark, text),) = probe_hosts(tmp_path / "locks", 0.2)
    assert (mark, "no other machine responded" in text) == ("note", True)
    assert list((tmp_path / "locks").iterdir()) == []


def test_old_leftovers_of_a_host_test_are_removed(tmp_path):
    meeting = tmp_path / ".two-hosts"
    meeting.mkdir()
    (meeting / "first").touch()
    os.utime(meeting, (0, 0))
    ((_, text),) = probe_hosts(tmp_path, 0.2)
    assert "no other machine responded" in text


def test_leftovers_of_a_killed_host_test_are_reported(tmp_path):
    meeting = tmp_path / "locks" / ".two-hosts"
    meeting.mkdir(parents=True)
    for name in ("first", "first-is", "lock"):
        (meeting / name).write_text("one")
    ((mark, text),) = probe_hosts(tmp_path / "locks", 0.2)
    assert mark == "note"
    assert "one does not answer" in text
    assert f"{meeting} is left over: remove it" in text
    assert not (tmp_path / "locks" / "hosts.json").exists()
