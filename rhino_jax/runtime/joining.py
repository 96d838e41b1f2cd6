"""How the processes of one run join, whoever started them."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from rhino_jax import compat
from rhino_jax.errors import ProcessError
from rhino_jax.runtime.job import this_job

HEARTBEAT_SECONDS = 10
"""How long a process may be silent before the others are ended (JAX's own: 100)."""
JOINING_SECONDS = 120
"""How long the processes of ``rhino launch`` wait for one another to start."""
BY_HAND = ("coordinator_address", "num_processes", "process_id")
_HOST_KEY = "rhino/host"


def initialize(**given: Any) -> None:
    """See :func:`rhino_jax.initialize`."""
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
    elif "JAX_COORDINATOR_ADDRESS" in os.environ:
        given = {"coordinator_address": os.environ["JAX_COORDINATOR_ADDRESS"], **given}
    missing = [name for name in BY_HAND if name not in given]
    if missing and not compat.cluster_detected():
        if len(missing) == len(BY_HAND):
            return
        said = [f"{name}={given[name]!r}" for name in BY_HAND if name in given]
        raise ProcessError(
            f"initialize: {' and '.join(said)} is known, {' and '.join(missing)} not; "
            f"give all of {', '.join(BY_HAND)}, or none under a launcher that tells "
            "them (rhino launch, Slurm, MPI)"
        )
    if given.get("process_id") == 0:
        check_free(given.get("coordinator_bind_address") or _everywhere(given))
    try:
        jax.distributed.initialize(
            **{"heartbeat_timeout_seconds": HEARTBEAT_SECONDS, **given}
        )
    except ValueError as error:
        raise ProcessError(f"initialize: {error}") from error
    store = compat.key_values()
    assert store is not None
    store.set(f"{_HOST_KEY}/{compat.process_id()}", socket.gethostname().encode())


def hosts(ranks: Sequence[int]) -> dict[int, str]:
    """The machine that each process runs on, by its rank.

    A process that did not call :func:`initialize` counts as a machine of its own.
    """
    store = compat.key_values()
    said = store.under(_HOST_KEY) if store else {}
    alone = {rank: f"process {rank}".encode() for rank in ranks}
    return {r: said.get(f"{_HOST_KEY}/{r}", alone[r]).decode() for r in ranks}


def _everywhere(given: Mapping[str, Any]) -> str:
    """Where JAX's service listens unless told: on this port of every address."""
    _, _, port = str(given["coordinator_address"]).rpartition(":")
    return f"[::]:{port}" if socket.has_dualstack_ipv6() else f"0.0.0.0:{port}"


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
