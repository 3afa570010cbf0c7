"""What MLX's ring says when a peer is lost does not reach the terminal, whatever else does."""

from __future__ import annotations

import subprocess
import sys

SAYS = """
import os, time
from mlxchat.launch.noise import divert_noise
kept = []
divert_noise(kept.append)
# Two threads of MLX at once: the second line has lost its first word.
for part in (b"[ring] ", b"[ring] Sending to socket 9 failed with errno 32\\n", b"Sending to ", b"socket 10 failed\\n",
             b"a warning\\n", b"[ring] Socket 4 was closed by the peer\\n", b"really? "):
    os.write(2, part)
    time.sleep(0.02)
print(len(kept))
"""


def test_lines_of_the_ring_are_kept_away_also_where_two_fall_into_each_other() -> None:
    done = subprocess.run([sys.executable, "-c", SAYS], capture_output=True, text=True, timeout=20, check=True)
    assert done.stderr == "a warning\nreally? "
    assert done.stdout == "3\n"
