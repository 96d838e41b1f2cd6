"""What ``rhino launch`` tells each of the processes that it starts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from rhino_jax.errors import ProcessError, problems

VARIABLES = {
    "coordinator": "RHINO_COORDINATOR",
    "count": "RHINO_PROCESS_COUNT",
    "rank": "RHINO_PROCESS_ID",
    "folder": "RHINO_STATUS_FOLDER",
}


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


def forget_environment() -> None:
    """Make what this process starts no worker of the job; the job itself is known."""
    this_job()
    for name in VARIABLES.values():
        os.environ.pop(name, None)
