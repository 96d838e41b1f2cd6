"""The processes of one run: what ``rhino launch`` tells them, and how they join."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jax

from rhino_jax import compat
from rhino_jax.errors import ProcessError, problems

HEARTBEAT_SECONDS = 10
"""How long a process may be silent before the others are ended (JAX's own: 100)."""
JOINING_SECONDS = 120
"""How long the processes of ``rhino launch`` wait for one another to start."""
VARIABLES = {
    "coordinator": "RHINO_COORDINATOR",
    "count": "RHINO_PROCESS_COUNT",
    "rank": "RHINO_PROCESS_ID",
    "folder": "RHINO_STATUS_FOLDER",
}
_HOST_KEY = "rhino/host"
BY_HAND = ("coordinator_address", "num_processes", "process_id")


@dataclass(frozen=True)
class Job:
    """One process's place among those that ``rhino launch`` started."""

    coordinator: str
    """"127.0.0.1:port", where process 0 listens."""
    count: int
    rank: int
    folder: Path
    """Where the processes leave their status."""

    @property
    def status_path(self) -> Path:
        return self.folder / f"worker-{self.rank}.status"

    def environment(self) -> dict[str, str]:
        """The variables that say all this; :func:`job_of` reads them."""
        return {name: str(getattr(self, key)) for key, name in VARIABLES.items()}


def job_of(environment: Mapping[str, str]) -> Job | None:
    """The job that an environment tells of; None where it tells of none.

    Raises:
        ProcessError: it is told in part, or makes no sense; everything wrong at once.

    >>> job_of({}), job_of(Job("127.0.0.1:1", 4, 2, Path("/tmp")).environment()).rank
    (None, 2)
    """
    given = {
        key: environment[name] for key, name in VARIABLES.items() if name in environment
    }
    if not given:
        return None
    wrong = [
        f"{name} is not set" for key, name in VARIABLES.items() if key not in given
    ]
    for key in ("count", "rank"):
        if key in given and not given[key].isdecimal():
            wrong.append(f"{VARIABLES[key]}={given[key]!r} is no number")
    if not wrong and not int(given["rank"]) < int(given["count"]):
        wrong.append(
            f"{VARIABLES['rank']}={given['rank']} is not below "
            f"{VARIABLES['count']}={given['count']}"
        )
    if wrong:
        raise ProcessError(
            problems(
                "the environment of `rhino launch` is half set:",
                wrong,
                "Start the script with `rhino launch`, or unset "
                f"{', '.join(VARIABLES.values())}.",
            )
        )
    return Job(
        given["coordinator"],
        int(given["count"]),
        int(given["rank"]),
        Path(given["folder"]),
    )


@cache
def this_job() -> Job | None:
    """The job of this process; None where ``rhino launch`` did not start it."""
    return job_of(os.environ)


def initialize(**given: Any) -> None:
    """Join the other processes of this run, if there are any, before JAX is used.

    Under ``rhino launch``, Slurm, Open MPI, Kubernetes and on TPU pods the others are
    found; elsewhere ``given`` names them, as for ``jax.distributed.initialize``
    (``coordinator_address``, ``num_processes``, ``process_id``). Where there are none
    nothing happens, nor a second time. A process that is silent for 10 seconds ends the
    run (``heartbeat_timeout_seconds``; JAX alone waits 100).

    Raises:
        ProcessError: the launcher's environment, or ``given``, is half set; the
            coordinator's port is in use.

    >>> initialize()
    """
    if jax.distributed.is_initialized():
        return
    job = this_job()
    if job is not None:
        given = {
            **dict(zip(BY_HAND, (job.coordinator, job.count, job.rank), strict=True)),
            "coordinator_bind_address": job.coordinator,
            "initialization_timeout": JOINING_SECONDS,
            "cluster_detection_method": "deactivate",
            **given,
        }
    elif not any(name in given for name in BY_HAND) and not compat.cluster_detected():
        if "JAX_COORDINATOR_ADDRESS" not in os.environ:
            return
    missing = [name for name in BY_HAND if name not in given]
    if 0 < len(missing) < len(BY_HAND) and not compat.cluster_detected():
        said = {name: given[name] for name in BY_HAND if name in given}
        raise ProcessError(
            f"initialize: {said} is given, {' and '.join(missing)} not; give all of "
            f"{', '.join(BY_HAND)}, or none under a launcher that tells them"
        )
    if given.get("process_id") == 0:
        check_free(given.get("coordinator_bind_address", given["coordinator_address"]))
    try:
        jax.distributed.initialize(
            **{"heartbeat_timeout_seconds": HEARTBEAT_SECONDS, **given}
        )
    except ValueError as error:
        raise ProcessError(
            f"initialize: the launcher's environment is half set: {error} Give "
            f"initialize() {', '.join(BY_HAND)}, or start with `rhino launch`."
        ) from error
    key = f"{_HOST_KEY}/{compat.process_id()}"
    compat.key_values().key_value_set(key, socket.gethostname())


def hosts(ranks: Sequence[int]) -> dict[int, str]:
    """The machine that each process runs on, by its rank.

    A process that did not call :func:`initialize` counts as a machine of its own.
    """
    store = compat.key_values()
    said = dict(store.key_value_dir_get(_HOST_KEY)) if store else {}
    return {r: said.get(f"{_HOST_KEY}/{r}", f"process {r}") for r in ranks}


def check_free(address: str) -> None:
    """Check that "host:port" of this machine can be listened on.

    JAX's own service ends the process with a segmentation fault where it is in use.

    Raises:
        ProcessError: another program listens there, or it is no address of this host.
    """
    host, _, port = address.rpartition(":")
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise ProcessError(
            f"coordinator {address!r} is no host:port; a port is 1 to 65535"
        )
    name = host.strip("[]")
    family = socket.AF_INET6 if ":" in name else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((name, int(port)))
        except OSError as error:
            raise ProcessError(
                f"coordinator {address} can not be listened on ({error.strerror}); "
                "choose another port, or end what listens there"
            ) from error


def free_port() -> int:
    """A port of the loopback address that nobody listens on now.

    JAX can not choose one itself: with port 0 the others never find it.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
