"""``rhino launch``: a script on several processes of this host, ended as one."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import click

from rhino_jax.runtime.job import Job, check_free, free_port
from rhino_jax.runtime.launcher import Interrupted, run, worker_environment


@click.command(context_settings={"ignore_unknown_options": True})
@click.option(
    "-n",
    "--processes",
    required=True,
    type=click.IntRange(1),
    help="How many processes.",
)
@click.option(
    "--devices",
    default=1,
    show_default=True,
    type=click.IntRange(1),
    help="Simulated CPU devices of each process.",
)
@click.option(
    "--port",
    default=0,
    type=click.IntRange(0, 65535),
    help="Where process 0 listens; default: a free port.",
)
@click.option(
    "--logs",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the output of every process; default: a temporary one, kept "
    "where something fails.",
)
@click.option(
    "--all", "every", is_flag=True, help="Show what all processes print, not only 0."
)
@click.argument("script", type=click.Path(exists=True, dir_okay=False))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def launch(
    processes: int,
    devices: int,
    port: int,
    logs: Path | None,
    every: bool,
    script: str,
    arguments: tuple[str, ...],
) -> None:
    """Try SCRIPT on several processes of this host, each with simulated CPU devices.

    They are joined before the script starts (its own rhino.initialize() then changes
    nothing), and what process 0 prints is shown. A process that dies ends all, and the
    last line names it with its last instruction. Several hosts have launchers of their
    own (Slurm, MPI, Kubernetes): call rhino.initialize() in the script there.
    """
    address = f"127.0.0.1:{port or free_port()}"
    check_free(address)
    environment = worker_environment(os.environ, devices)
    folder = (logs or Path(tempfile.mkdtemp(prefix="rhino-launch-"))).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [Job(address, processes, rank, folder) for rank in range(processes)]
    command = [sys.executable, "-m", "rhino_jax.runtime.worker", script, *arguments]
    shown = {rank: f"[{rank}]" for rank in range(processes)} if every else {0: ""}
    try:
        dead = run(command, jobs, environment, shown)
    except Interrupted as request:
        name = signal.Signals(request.number).name
        click.echo(f"rhino launch: ended by {name}; logs: {folder}", err=True)
        sys.exit(128 + request.number)
    if dead is None:
        if logs is None:
            shutil.rmtree(folder)
        return
    if dead.job.rank not in shown:
        click.echo(f"worker {dead.job.rank} printed last:\n{dead.tail()}", err=True)
    click.echo(f"rhino launch: {dead.obituary()}", err=True)
    code = dead.process.returncode
    sys.exit(code if code > 0 else 128 - code)
