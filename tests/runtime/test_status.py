"""The last instruction outlives its process, however that ends."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from rhino_jax.runtime.status import Instruction, Status, read_status

KILLED = """
import os, signal, sys
from pathlib import Path
from rhino_jax.runtime.status import Status
status = Status(Path(sys.argv[1]))
status.began("planning step")
for call in range(1, 1001):
    status.began("step", call)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_left_its_last(tmp_path: Path) -> None:
    path = tmp_path / "status"
    before = time.time()
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert done.returncode == -9
    last = read_status(path)
    assert last is not None and str(last) == "call 1000 of step"
    assert before <= last.began <= time.time()


def test_what_can_not_be_read_is_none(tmp_path: Path) -> None:
    path = tmp_path / "status"
    assert read_status(path) is None
    path.write_bytes(b"short")
    assert read_status(path) is None
    status = Status(path)
    assert read_status(path) is None
    status.began("é" * 300)  # cut in the middle of a letter
    last = read_status(path)
    assert isinstance(last, Instruction) and last.what.startswith("é" * 119)


def test_a_shorter_text_leaves_nothing_of_the_longer(tmp_path: Path) -> None:
    status = Status(tmp_path / "status")
    for text in ("waiting for the other processes", "step"):
        status.began(text)
        assert str(read_status(tmp_path / "status")) == text
