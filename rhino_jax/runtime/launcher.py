"""Processes of one job on this host: started together, watched, ended together.

Their output goes to files, so that no worker waits for a reader and nothing is lost
with a worker. A thread waits for each worker, so that of several that die the first one
is known: the others mostly die of it.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, BinaryIO

from rhino_jax.errors import ProcessError, problems
from rhino_jax.runtime.job import VARIABLES, Job
from rhino_jax.runtime.status import Status, read_status

GRACE_SECONDS = 3.0
"""How long workers have between being asked to end and being killed."""
POLL_SECONDS = 0.05
TAIL_LINES = 15
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_DEVICE_COUNT = re.compile(r"--xla_force_host_platform_device_count=\S+")
_ELSEWHERE = ("JAX_COORDINATOR_ADDRESS", "JAX_COORDINATOR_BIND_ADDRESS")


@dataclass
class Worker:
    """One process of a job, and how much of its log was shown."""

    job: Job
    process: subprocess.Popen[bytes]
    shown_bytes: int = 0
    ended: float = 0.0
    """When it ended, in seconds since the epoch."""

    @property
    def log(self) -> Path:
        return log_of(self.job)

    def send(self, number: int) -> None:
        """Signal the worker and what it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)

    def obituary(self) -> str:
        """How the worker ended, and its last instruction."""
        code = self.process.returncode
        how = f"ended with exit code {code}"
        if code < 0:
            name = signal.Signals(-code).name
            more = " (kill -9, or out of memory)" if -code == signal.SIGKILL else ""
            how = f"was killed by {name}{more}"
        last = read_status(self.job.status_path)
        did = "unknown, its status file is gone"
        if last:
            did = f"{last} (begun {self.ended - last.began:.1f} s before)"
        return (
            f"worker {self.job.rank} (pid {self.process.pid}) {how}; its last "
            f"instruction: {did}; log: {self.log}"
        )

    def tail(self) -> str:
        """The last lines of the log."""
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join(lines[-TAIL_LINES:])

    def show(self, out: BinaryIO, prefix: str, to_the_end: bool = False) -> None:
        """Write what is new in the log: whole lines where they get a prefix."""
        with self.log.open("rb") as file:
            file.seek(self.shown_bytes)
            new = file.read()
        if prefix:
            if not to_the_end:
                new = new[: new.rfind(b"\n") + 1]
            mark = f"{prefix} ".encode()
            out.writelines(mark + line for line in new.splitlines(keepends=True))
        else:
            out.write(new)
        self.shown_bytes += len(new)
        out.flush()


def log_of(job: Job) -> Path:
    return job.folder / f"worker-{job.rank}.log"


_IN_ORDER = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
"""For programs whose collectives go from process to process. Scheduled to run side
by side, the default of CPUs, they gave wrong sums (jaxlib 0.10.2: a pipeline in one
program on 4 processes, gradients off by 1 % in most runs; in none since)."""


class Interrupted(Exception):
    """The launcher was asked to end, by signal ``number``."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def worker_environment(given: Mapping[str, str], devices: int) -> dict[str, str]:
    """The environment of workers with so many simulated CPU devices each.

    Raises:
        ProcessError: ``given`` asks for another platform or another launcher.

    >>> flags = {"XLA_FLAGS": "--a=1 --xla_force_host_platform_device_count=8"}
    >>> worker_environment(flags, 2)["XLA_FLAGS"].split()[0]
    '--a=1'
    """
    wrong = [
        f"{name}={given[name]}: this script is started by another launcher already"
        for name in (*_ELSEWHERE, *VARIABLES.values())
        if given.get(name)
    ]
    if given.get("JAX_PLATFORMS", "cpu") != "cpu":
        wrong.append(
            f"JAX_PLATFORMS={given['JAX_PLATFORMS']}: rhino launch simulates CPU "
            "devices; GPU hosts have launchers of their own (Slurm, MPI)"
        )
    if wrong:
        raise ProcessError(problems("the environment:", wrong, "Unset these."))
    flags = _DEVICE_COUNT.sub("", given.get("XLA_FLAGS", "")).strip()
    if _IN_ORDER.partition("=")[0] not in flags:
        flags = f"{flags} {_IN_ORDER}".strip()
    return {
        **given,
        "XLA_FLAGS": flags,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "PYTHONUNBUFFERED": "1",
    }


def run(
    command: Sequence[str],
    jobs: Sequence[Job],
    environment: Mapping[str, str],
    shown: Mapping[int, str],
) -> Worker | None:
    """Run ``command`` once for every job; the first worker that failed, if one did.

    All have ended when this returns or raises.

    Args:
        shown: ranks whose output is shown, each with the prefix of its lines.

    Raises:
        Interrupted: a signal asked the launcher to end.
    """
    workers: list[Worker] = []
    ended: SimpleQueue[Worker] = SimpleQueue()
    before = {number: signal.getsignal(number) for number in ENDING_SIGNALS}
    try:
        for number in ENDING_SIGNALS:
            signal.signal(number, _interrupt)
        for job in jobs:
            workers.append(_start(command, job, environment))
            threading.Thread(
                target=_wait, args=(workers[-1], ended), daemon=True
            ).start()
        return _watch(workers, ended, shown)
    finally:
        for number in ENDING_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        _end(workers)
        _show(workers, shown, to_the_end=True)
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: Any) -> None:
    raise Interrupted(number)


def _start(command: Sequence[str], job: Job, environment: Mapping[str, str]) -> Worker:
    Status(job.status_path).began("starting Python")
    with log_of(job).open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**environment, **job.environment()},
            start_new_session=True,  # so that Ctrl-C reaches the launcher alone
        )
    return Worker(job, process)


def _wait(worker: Worker, ended: SimpleQueue[Worker]) -> None:
    worker.process.wait()
    worker.ended = time.time()
    ended.put(worker)


def _watch(
    workers: Sequence[Worker], ended: SimpleQueue[Worker], shown: Mapping[int, str]
) -> Worker | None:
    """Wait until all have ended well, or the first has failed: that one."""
    running = len(workers)
    while running:
        with contextlib.suppress(Empty):
            worker = ended.get(timeout=POLL_SECONDS)
            if worker.process.returncode:
                return worker
            running -= 1
        _show(workers, shown)
    return None


def _show(
    workers: Sequence[Worker], shown: Mapping[int, str], to_the_end: bool = False
) -> None:
    for worker in workers:
        if worker.job.rank in shown:
            prefix = shown[worker.job.rank]
            worker.show(sys.stdout.buffer, prefix, to_the_end)


def _end(workers: Sequence[Worker]) -> None:
    """Ask all to end, and kill what is left after :data:`GRACE_SECONDS`.

    JAX catches SIGTERM and goes on: mostly it is the second that ends them.
    """
    until = time.monotonic() + GRACE_SECONDS
    for number in (signal.SIGTERM, signal.SIGKILL):
        left = [worker for worker in workers if worker.process.poll() is None]
        for worker in left:
            worker.send(number)
        for worker in left:
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.process.wait(max(0.0, until - time.monotonic()))
        until += GRACE_SECONDS
    for worker in workers:  # and what they have started
        worker.send(signal.SIGKILL)
