"""Processes started, watched and ended together; no JAX in them."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from rhino_jax.errors import ProcessError
from rhino_jax.runtime import launcher
from rhino_jax.runtime.job import Job
from rhino_jax.runtime.launcher import Interrupted, run, worker_environment

HEAD = """
import os, signal, sys, time
from pathlib import Path
rank = int(os.environ["RHINO_PROCESS_ID"])
folder = Path(os.environ["RHINO_STATUS_FOLDER"])
(folder / f"pid{rank}").write_text(str(os.getpid()))
"""
IGNORES = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
WAITS = "time.sleep(60)\n"


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "GRACE_SECONDS", 0.3)


def start(
    folder: Path, script: str, shown: dict[int, str], count: int = 3
) -> launcher.Worker | None:
    jobs = [Job("127.0.0.1:1", count, rank, folder) for rank in range(count)]
    command = [sys.executable, "-S", "-c", HEAD + script]
    return run(command, jobs, os.environ, shown)


def alive(folder: Path) -> list[int]:
    pids = [int(path.read_text()) for path in folder.glob("pid*")]
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_all_end_well(tmp_path: Path, capfdbinary: pytest.CaptureFixture) -> None:
    script = "print('line', rank)\nprint('end', rank, end='')\n"
    assert start(tmp_path, script, {0: ""}) is None
    assert capfdbinary.readouterr().out == b"line 0\nend 0"
    assert start(tmp_path, script, {0: "[0]", 2: "[2]"}) is None
    shown = capfdbinary.readouterr().out
    assert b"[0] line 0\n" in shown and b"[2] end 2" in shown and b"1" not in shown
    assert (tmp_path / "worker-1.log").read_text() == "line 1\nend 1"


@pytest.mark.parametrize(
    ("death", "told"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "was killed by SIGKILL (kill -9, or"),
        ("sys.exit(7)", "ended with exit code 7"),
        ("os.abort()", "was killed by SIGABRT;"),
    ],
)
def test_the_first_that_dies_is_named(death: str, told: str, tmp_path: Path) -> None:
    """The others, which die of it, are not."""
    script = f"""
if rank == 1:
    time.sleep(0.3)
    {death}
{IGNORES}
pid1, other = folder / "pid1", ""
while not other:  # a file that is there may be empty still
    time.sleep(0.01)
    other = pid1.read_text() if pid1.exists() else ""
stat = Path(f"/proc/{{other}}/stat")
while stat.exists() and stat.read_text().split()[2] not in "ZX":
    time.sleep(0.01)
time.sleep(0.2)  # as long as it takes to notice at the soonest
sys.exit(3)
"""
    dead = start(tmp_path, script, {})
    assert dead is not None and dead.job.rank == 1
    said = dead.obituary()
    pid = (tmp_path / "pid1").read_text()
    assert f"worker 1 (pid {pid}) {told}" in said
    assert "its last instruction: starting Python (begun " in said
    assert not alive(tmp_path)


def test_what_workers_started_ends_too(tmp_path: Path) -> None:
    script = """
if os.fork() == 0:
    (folder / f"pid{rank + 10}").write_text(str(os.getpid()))
    time.sleep(60)
while len(list(folder.glob("pid*"))) < 4:
    time.sleep(0.01)
if rank == 0:
    sys.exit(1)
time.sleep(60)
"""
    assert start(tmp_path, script, {}, count=2) is not None
    until = time.monotonic() + 5
    while alive(tmp_path) and time.monotonic() < until:
        time.sleep(0.01)
    assert not alive(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all(number: int, tmp_path: Path) -> None:
    def interrupt() -> None:
        while len(list(tmp_path.glob("pid*"))) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(Interrupted) as caught:
        start(tmp_path, IGNORES + WAITS, {}, count=2)
    thread.join()
    assert caught.value.number == number
    assert signal.getsignal(number) is before
    assert not alive(tmp_path)


def test_an_environment_of_another_launcher() -> None:
    given = {"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_PLATFORMS": "cuda"}
    with pytest.raises(ProcessError) as caught:
        worker_environment(given, 2)
    assert "JAX_COORDINATOR_ADDRESS=host:1" in str(caught.value)
    assert "JAX_PLATFORMS=cuda" in str(caught.value)


def test_collectives_of_workers_run_in_order() -> None:
    flag = "--xla_cpu_enable_concurrency_optimized_scheduler"
    assert worker_environment({}, 2)["XLA_FLAGS"] == f"{flag}=false"
    own = {"XLA_FLAGS": f"{flag}=true"}
    assert worker_environment(own, 2)["XLA_FLAGS"] == f"{flag}=true"
