"""Ranks on two hosts: network namespaces with a slow link that is cut."""

import json
import os
import shutil
import subprocess
import sys

import pytest

# Two hosts, vm and mini2, of which the second has neither outputs nor the command's working directory.
SCRIPT = """
set -e
cd "$FOLDER"
ip link set lo up
unshare -nu sh -c 'hostname mini2; exec sleep 3000' & other=$!
trap 'kill -9 $other' EXIT
sleep 0.3
on_other() { nsenter -t $other -n -u "$@"; }
ip link add v0 type veth peer name v1
ip link set v1 netns $other
ip addr add 10.77.0.1/24 dev v0
ip link set v0 up
on_other ip addr add 10.77.0.2/24 dev v1
on_other ip link set v1 up
on_other ip link set lo up
delay() { tc qdisc add dev v0 root netem delay 5ms 2> /dev/null; }
delay || tc qdisc add dev v0 root tbf rate 200mbit burst 64kb latency 50ms  # not every kernel has delays
echo '[["10.77.0.1:5000"], ["10.77.0.2:5000"]]' > hosts.json
run() {
    export MLX_HOSTFILE=$PWD/hosts.json
    (
        cd /; code=0
        MLX_RANK=1 on_other "$@" > "$FOLDER/$name-1.txt" 2>&1 || code=$?
        echo $code > "$FOLDER/$name-1.code"
    ) & follower=$!
    MLX_RANK=0 "$@" > $name-0.txt 2>&1 & leader=$!
}
finish() {
    set +e
    wait $leader; echo $? > $name-0.code
    wait $follower
    set -e
}
name=cut; run "$@"
for _ in $(seq 900); do ls outputs/work/*/ckpt/00000[1-9]* > /dev/null 2>&1 && break; sleep 0.1; done
ip link set v0 down
began=$(date +%s)
finish
echo $(($(date +%s) - began)) > cut-seconds
ip link set v0 up
name=again; run "$@"; finish
"""


def has_namespaces() -> bool:
    if not all(map(shutil.which, ("unshare", "nsenter", "ip", "tc"))):
        return False
    tried = subprocess.run(
        ["unshare", "-Urn", "unshare", "-nu", "sh", "-c", "ip link add v0 type veth peer name v1"], capture_output=True
    )
    return tried.returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not has_namespaces(), reason="network namespaces are not allowed here")
def test_two_hosts_end_with_their_link_and_resume(tiny, mlxchat, tmp_path):
    settings = [*tiny, "stage=pretrain", "pretrain.num_iterations=300", "machine.checkpoint_seconds=0"]
    outputs = f"outputs={tmp_path}/outputs"
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("MLXCHAT", "MLX_", "PYTHON"))}
    done = subprocess.run(
        ["unshare", "-Urn", "bash", "-c", SCRIPT, "hosts", sys.executable, "-m", "mlxchat", *settings, outputs],
        env=clean | {"FOLDER": str(tmp_path), "MLXCHAT_SILENCE_SECONDS": "6"}, capture_output=True, text=True,
        timeout=2000, check=False,
    )  # fmt: skip
    printed = {path.name: path.read_text() for path in tmp_path.glob("*-?.*")}
    assert done.returncode == 0, (done.stderr, printed)
    assert printed["cut-0.code"].strip() == "1", printed
    assert printed["cut-1.code"].strip() == "1", printed
    # Six seconds of silence, and time for a busy machine.
    assert 5 <= int((tmp_path / "cut-seconds").read_text()) <= 60
    errors = [line for line in printed["cut-0.txt"].splitlines() if line.startswith("error:")]
    assert len(errors) == 1, printed
    assert "on mini2) has sent nothing for 6 seconds: it hangs, was stopped, or lost its network" in errors[0]
    assert "continues from iteration" in errors[0]
    assert "has sent nothing for 6 seconds, which ends this run" in printed["cut-1.txt"]
    assert printed["again-0.code"].strip() == printed["again-1.code"].strip() == "0", printed
    assert "[ring]" not in "".join(printed.values())
    found = json.loads((tmp_path / "outputs/refs/latest/pretrain/manifest.json").read_text())
    assert found["excluded"]["ranks"]["hosts"] == [os.uname().nodename, "mini2"]
    here = mlxchat(*settings, "machine.num_processes=2", f"outputs={tmp_path}/here", timeout=200)
    assert here.returncode == 0, here.stdout + here.stderr
    alone = json.loads((tmp_path / "here/refs/latest/pretrain/manifest.json").read_text())
    assert found["tree"] == alone["tree"]
