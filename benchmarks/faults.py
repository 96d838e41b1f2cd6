"""Does a killed process end the job, by name, and does a restart give the same losses?

``benchmarks/resumable.py`` under ``rhino launch``, several processes of one simulated
device, with ``--stages`` as a pipeline. Each process is killed (SIGKILL) at random
moments: every second time at any second of the run, from the start of the processes on,
otherwise up to half a second after a random step (every fourth saves a checkpoint).
Then: the launcher must end with another exit code than 0 within 30 seconds, its last
line must name the process and how it died; the same command started again must restore
every checkpoint it finds and end well, with the losses of a run that nobody
interrupted, those written before the kill too. Results are kept in a file; what is
there already is not run again. ``python -m benchmarks.faults --help``.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np

from benchmarks.kept import by_key, keep, rows
from benchmarks.resumable import STEPS

SCRIPT = Path(__file__).with_name("resumable.py")
LIMIT_SECONDS = 30.0
MOST_SECONDS = 300.0
"""Of any run: a job that hangs is a failure, not a wait."""
TOLERANCE = 1e-6
"""Of a loss, relative: gloo may add in another order."""


@dataclass(frozen=True)
class Death:
    """How a job ended whose process was killed ``moment_seconds`` after its start."""

    moment_seconds: float
    exit_seconds: float
    exit_code: int
    last_line: str
    named: bool
    """Whether the last line says which process died, and how."""


@dataclass(frozen=True)
class Trial:
    """One kill and the run after it."""

    key: str
    death: Death
    resumed_at: int
    resumed_code: int
    worst_loss: float

    @property
    def good(self) -> bool:
        return (
            self.death.exit_code != 0
            and self.death.exit_seconds <= LIMIT_SECONDS
            and self.death.named
            and self.resumed_code == 0
            and self.worst_loss <= TOLERANCE
        )


def start(folder: Path, processes: int, stages: int = 0) -> subprocess.Popen[str]:
    """The training script, from the start or from where it was stopped.

    As a pipeline where there are ``stages``. The launcher's logs lie in ``folder`` too.
    """
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "rhino_jax.cli", "launch", "-n", str(processes)),
            *("--logs", str(folder / "logs"), str(SCRIPT), str(folder), str(stages)),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])},
    )


def worker_pid(launcher: int, rank: int) -> int | None:
    """The process of a rank, by the environment of the launcher's children."""
    try:
        children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text()
    except OSError:
        return None
    for pid in map(int, children.split()):
        try:
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"RHINO_PROCESS_ID={rank}".encode() in variables:
            return pid
    return None


def losses_of(folder: Path) -> list[dict[str, float]]:
    """All that was written, in order; steps that ran twice are there twice."""
    return rows(folder / "losses.jsonl")


def uninterrupted(
    folder: Path, processes: int, stages: int
) -> tuple[list[float], float]:
    """The losses of a whole run, and its seconds."""
    began = time.perf_counter()
    job = start(folder, processes, stages)
    _, said = job.communicate(timeout=MOST_SECONDS)
    assert job.returncode == 0, said
    rows = losses_of(folder)
    return [row["loss"] for row in rows], time.perf_counter() - began


def killed(
    folder: Path,
    processes: int,
    rank: int,
    when: Callable[[float], bool],
    stages: int = 0,
) -> Death | None:
    """Kill ``rank`` at a moment; None where the run ended before.

    Args:
        when: whether the moment has come, so many seconds after the start.
    """
    job = start(folder, processes, stages)
    began = time.perf_counter()
    while not when(time.perf_counter() - began) and job.poll() is None:
        time.sleep(0.01)
    pid = worker_pid(job.pid, rank)
    if pid is None:
        job.communicate(timeout=MOST_SECONDS)
        return None
    os.kill(pid, signal.SIGKILL)
    moment = time.perf_counter()
    _, said = job.communicate(timeout=MOST_SECONDS)
    last = (said.strip().splitlines() or [""])[-1]
    named = re.search(rf"worker {rank} \(pid {pid}\) was killed by SIGKILL", last)
    return Death(
        round(moment - began, 2),
        round(time.perf_counter() - moment, 2),
        job.returncode,
        last,
        named is not None,
    )


def trial(
    key: str,
    folder: Path,
    processes: int,
    rank: int,
    when: Callable[[float], bool],
    expected: list[float],
    stages: int,
) -> Trial | None:
    """Kill, start again, compare; None where the run ended before the kill."""
    death = killed(folder, processes, rank, when, stages)
    if death is None:
        return None
    before = len(losses_of(folder))
    job = start(folder, processes, stages)
    job.communicate(timeout=MOST_SECONDS)
    rows = losses_of(folder)
    resumed = int(rows[before]["step"]) if len(rows) > before else len(expected)
    wrong = [abs(row["loss"] / expected[int(row["step"])] - 1) for row in rows]
    whole = {int(row["step"]) for row in rows} == set(range(len(expected)))
    worst = max(wrong) if whole else float("inf")
    return Trial(key, death, resumed, job.returncode, worst)


def at_a_second(rng: np.random.Generator, seconds: float) -> Callable[[float], bool]:
    """Any second of a run of so many."""
    moment = rng.uniform(0.3, seconds)
    return lambda passed: passed > moment


def after_a_step(rng: np.random.Generator, folder: Path) -> Callable[[float], bool]:
    """Soon after a step of the run that writes to ``folder``."""
    step, pause = int(rng.integers(STEPS - 1)), rng.uniform(0.0, 0.5)
    seen: list[float] = []

    def when(passed: float) -> bool:
        if not seen and len(losses_of(folder)) > step:
            seen.append(passed)
        return bool(seen) and passed > seen[0] + pause

    return when


@click.command()
@click.option("--processes", default=4, show_default=True)
@click.option("--stages", default=0, help="Of a pipeline; 0 is none.")
@click.option("--kills", default=10, show_default=True, help="Of each process.")
@click.option(
    "--out",
    default="faults.jsonl",
    show_default=True,
    type=click.Path(path_type=Path),
)
def main(processes: int, stages: int, kills: int, out: Path) -> None:
    """Run the kills that are missing and say which went wrong."""
    done = {
        key: Trial(**{**x, "death": Death(**x["death"])})
        for key, x in by_key(out).items()
    }
    with tempfile.TemporaryDirectory() as name:
        expected, seconds = uninterrupted(Path(name), processes, stages)
    click.echo(f"{len(expected)} steps in {seconds:.1f} s, nobody killed")
    for rank in range(processes):
        for number in range(kills):
            piped = f"|{stages} stages" if stages else ""
            key = f"{processes}|{rank}|{number}{piped}"
            rng = np.random.default_rng([processes, rank, number])
            while key not in done:
                with tempfile.TemporaryDirectory() as name:
                    folder = Path(name)
                    odd = after_a_step(rng, folder)
                    when = odd if number % 2 else at_a_second(rng, seconds)
                    made = trial(key, folder, processes, rank, when, expected, stages)
                if made is not None:
                    done[key] = made
                    keep(out, asdict(made))
            one = done[key]
            verdict = "good" if one.good else f"WRONG: {one}"
            click.echo(
                f"worker {rank}, killed after {one.death.moment_seconds} s: ended in "
                f"{one.death.exit_seconds} s, resumed at {one.resumed_at}: {verdict}"
            )
    good = sum(one.good for one in done.values())
    slowest = max(one.death.exit_seconds for one in done.values())
    click.echo(f"{good} of {len(done)} good, the slowest ended in {slowest} s")


if __name__ == "__main__":
    main()
