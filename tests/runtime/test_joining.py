"""What a launcher tells a process: whole, in part, or not at all."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

import rhino_jax as rhino
from rhino_jax.errors import ProcessError
from rhino_jax.runtime.job import Job, job_of
from rhino_jax.runtime.joining import check_free, free_port

JOB = Job("127.0.0.1:4000", 4, 2, Path("/tmp/there"))


def test_a_job_is_read_as_it_was_told() -> None:
    assert job_of({"HOME": "/", **JOB.environment()}) == JOB
    assert job_of({"HOME": "/"}) is None


def test_all_that_is_wrong_is_said_at_once() -> None:
    told = JOB.environment()
    del told["RHINO_COORDINATOR"]
    told["RHINO_PROCESS_ID"] = "two"
    with pytest.raises(ProcessError) as caught:
        job_of(told)
    assert "RHINO_COORDINATOR is not set" in str(caught.value)
    assert "RHINO_PROCESS_ID='two' is no number" in str(caught.value)
    with pytest.raises(ProcessError, match="4 is not below RHINO_PROCESS_COUNT=4"):
        job_of({**JOB.environment(), "RHINO_PROCESS_ID": "4"})


def test_initialize_given_in_part() -> None:
    with pytest.raises(ProcessError, match="num_processes and process_id not;"):
        rhino.initialize(coordinator_address="127.0.0.1:4000")


def test_a_coordinator_named_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:4000")
    with pytest.raises(ProcessError, match=r"127.0.0.1:4000. is known, num_processes"):
        rhino.initialize()


def test_a_port_in_use() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ProcessError, match=f"{address} can not be listened on"):
            check_free(address)
        with pytest.raises(ProcessError, match="already in use"):
            rhino.initialize(coordinator_address=address, num_processes=2, process_id=0)
    check_free(f"127.0.0.1:{free_port()}")
    with pytest.raises(ProcessError, match="no host:port"):
        check_free("here")
