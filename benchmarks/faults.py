"""Does a killed process end the job, by name, and does a restart give the same losses?

``benchmarks/resumable.py`` under ``rhino launch``, several processes of one simulated
device. Each process is killed (SIGKILL) at random moments of the run, from the start of
the processes on. Then: the launcher must end with another exit code than 0 within 30
seconds, its last line must name the process and how it died; the same command started
again must restore every checkpoint it finds and end well, with the losses of a run that
nobody interrupted, those written before the kill too. Results are kept in a file; what
is there already is not run again. ``python -m benchmarks.faults --help``.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np

SCRIPT = Path(__file__).with_name("resumable.py")
LIMIT_SECONDS = 30.0
MOST_SECONDS = 300.0
"""Of any run: a job that hangs is a failure, not a wait."""
TOLERANCE = 1e-6
"""Of a loss, relative: gloo may add in another order."""


@dataclass(frozen=True)
class Trial:
    """One kill and the run after it."""

    key: str
    moment_seconds: float
    exit_seconds: float
    exit_code: int
    last_line: str
    named: bool
    resumed_at: int
    resumed_code: int
    worst_loss: float

    @property
    def good(self) -> bool:
        return (
            self.exit_code != 0
            and self.exit_seconds <= LIMIT_SECONDS
            and self.named
            and self.resumed_code == 0
            and self.worst_loss <= TOLERANCE
        )


def start(folder: Path, processes: int) -> subprocess.Popen[str]:
    """The training script, from the start or from where it was stopped."""
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "rhino_jax.cli", "launch", "-n", str(processes)),
            *(str(SCRIPT), str(folder)),
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
    file = folder / "losses.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines]


def uninterrupted(folder: Path, processes: int) -> tuple[list[float], float]:
    """The losses of a whole run, and its seconds."""
    began = time.perf_counter()
    job = start(folder, processes)
    _, said = job.communicate(timeout=MOST_SECONDS)
    assert job.returncode == 0, said
    rows = losses_of(folder)
    return [row["loss"] for row in rows], time.perf_counter() - began


def killed(
    folder: Path, processes: int, rank: int, moment: float
) -> tuple[int, float, str, bool] | None:
    """Kill ``rank`` after ``moment`` seconds: exit code, seconds, last line, named.

    None where the run ended before.
    """
    job = start(folder, processes)
    time.sleep(moment)
    pid = worker_pid(job.pid, rank)
    if pid is None:
        job.communicate(timeout=MOST_SECONDS)
        return None
    os.kill(pid, signal.SIGKILL)
    began = time.perf_counter()
    _, said = job.communicate(timeout=MOST_SECONDS)
    seconds = time.perf_counter() - began
    last = (said.strip().splitlines() or [""])[-1]
    named = re.search(rf"worker {rank} \(pid {pid}\) was killed by SIGKILL", last)
    return job.returncode, seconds, last, named is not None


def trial(
    key: str,
    folder: Path,
    processes: int,
    rank: int,
    moment: float,
    expected: list[float],
) -> Trial | None:
    """Kill, start again, compare; None where the run ended before the kill."""
    found = killed(folder, processes, rank, moment)
    if found is None:
        return None
    code, seconds, last, named = found
    before = len(losses_of(folder))
    job = start(folder, processes)
    job.communicate(timeout=MOST_SECONDS)
    rows = losses_of(folder)
    resumed = int(rows[before]["step"]) if len(rows) > before else len(expected)
    wrong = [abs(row["loss"] / expected[int(row["step"])] - 1) for row in rows]
    whole = {int(row["step"]) for row in rows} == set(range(len(expected)))
    return Trial(
        key,
        round(moment, 2),
        round(seconds, 2),
        code,
        last,
        named,
        resumed,
        job.returncode,
        max(wrong) if whole else float("inf"),
    )


@click.command()
@click.option("--processes", default=4, show_default=True)
@click.option("--kills", default=10, show_default=True, help="Of each process.")
@click.option(
    "--out",
    default="faults.jsonl",
    show_default=True,
    type=click.Path(path_type=Path),
)
def main(processes: int, kills: int, out: Path) -> None:
    """Run the kills that are missing and say which went wrong."""
    lines = out.read_text().splitlines() if out.exists() else []
    done = {trial.key: trial for trial in (Trial(**json.loads(x)) for x in lines)}
    with tempfile.TemporaryDirectory() as name:
        expected, seconds = uninterrupted(Path(name), processes)
    click.echo(f"{len(expected)} steps in {seconds:.1f} s, nobody killed")
    for rank in range(processes):
        for number in range(kills):
            key = f"{processes}|{rank}|{number}"
            rng = np.random.default_rng([processes, rank, number])
            while key not in done:
                moment = float(rng.uniform(0.3, seconds))
                with tempfile.TemporaryDirectory() as name:
                    made = trial(key, Path(name), processes, rank, moment, expected)
                if made is not None:
                    done[key] = made
                    with out.open("a") as file:
                        file.write(json.dumps(asdict(made)) + "\n")
            one = done[key]
            verdict = "good" if one.good else f"WRONG: {one}"
            click.echo(
                f"worker {rank}, killed after {one.moment_seconds} s: ended in "
                f"{one.exit_seconds} s, resumed at {one.resumed_at}: {verdict}"
            )
    good = sum(one.good for one in done.values())
    slowest = max(one.exit_seconds for one in done.values())
    click.echo(f"{good} of {len(done)} good, the slowest ended in {slowest} s")


if __name__ == "__main__":
    main()
