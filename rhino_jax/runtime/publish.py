"""One answer for several processes: the first makes it, all get it, or all are refused.

Everything goes through the key-value store of ``jax.distributed``. A meeting is one
question that every process of a group asks at the same place of its program: each says
what it has (its facts); the leader compares them and publishes its answer, or why there
is none. So nobody waits for an answer that will not come.
"""

from __future__ import annotations

import contextlib
import json
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from rhino_jax import compat, errors
from rhino_jax.errors import ProcessError, RhinoError, problems
from rhino_jax.ir.spans import spans
from rhino_jax.runtime.status import began

ARRIVAL_SECONDS = 300.0
"""How long processes wait for one another at a meeting."""
READING_SECONDS, TELLING_SECONDS = 10.0, 1.0
"""How long the leader waits, before it fails, until the others know why, and then until
they have said so: with process 0 goes the store, and with it JAX ends the others."""
_SLICE_SECONDS = 2.0  # no wait is longer, so that Ctrl-C is heard
_ROOT = "rhino"
_SHOWN = 8

Facts = Mapping[str, Any]
"""What a process has, by name: JSON values, or mappings of them."""


@dataclass(frozen=True)
class Group:
    """The processes that run one program together, and this one's place among them.

    ``store`` is the client of the key-value store.
    """

    store: Any
    ranks: tuple[int, ...]
    rank: int

    @property
    def leads(self) -> bool:
        return self.rank == self.ranks[0]


def group_of(devices: Sequence[Any]) -> Group | None:
    """The processes that ``devices`` belong to; None where they are of one only.

    Raises:
        ProcessError: none of the devices is this process's.
    """
    ranks = tuple(sorted({device.process_index for device in devices}))
    if len(ranks) == 1:
        return None
    rank = jax.process_index()
    if rank not in ranks:
        raise ProcessError(
            f"process {rank} has no device of this mesh, only processes {spans(ranks)} "
            "have; call the step there, or use a mesh over all of jax.devices()"
        )
    store = compat.key_values()
    assert store is not None, "devices of several processes without jax.distributed"
    return Group(store, ranks, rank)


def agreed(
    group: Group,
    name: str,
    facts: Facts,
    make: Callable[[], str],
    mend: str,
    arrival_seconds: float = ARRIVAL_SECONDS,
) -> str:
    """What ``make`` returns in the leader, in every process of the group.

    Args:
        name: of what is asked for ("planning step"), for messages.
        facts: what must be equal in all processes.
        make: called in the leader alone.
        mend: what to do where the facts differ, for the message.

    Raises:
        ProcessError: the facts differ (in every process, with what differs), or a
            process did not come in time.
        RhinoError: what ``make`` raised in the leader.
    """
    place = _meeting(group)
    mine = f"{place}/facts/{group.rank}"
    _set(group.store, mine, json.dumps(facts))
    until = time.monotonic() + arrival_seconds
    began(f"waiting for the other processes ({name})")
    if not group.leads:
        try:
            _arrived(group, place, group.ranks[:1], name, until, arrival_seconds)
        except ProcessError:  # so that a leader that comes late is refused too
            _set(group.store, mine, json.dumps({"patience": "gave up waiting"}))
            raise
        began(f"waiting for process {group.ranks[0]} ({name})")
        sealed = _get(group.store, f"{place}/answer", None)
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # process 0 may be gone
            _set(group.store, f"{place}/read/{group.rank}", "")
        return _opened(sealed, group.ranks[0])
    try:
        said = _arrived(group, place, group.ranks, name, until, arrival_seconds)
        _compare(name, {r: json.loads(text) for r, text in said.items()}, mend)
        answer = make()
    except BaseException as error:
        refusal = {"kind": type(error).__name__, "error": str(error)}
        _set(group.store, f"{place}/answer", json.dumps(refusal))
        _wait_for_readers(group, place)
        raise
    _set(group.store, f"{place}/answer", json.dumps({"answer": answer}))
    return answer


def _wait_for_readers(group: Group, place: str) -> None:
    """Give the others the time to read why there is no answer."""
    until = time.monotonic() + READING_SECONDS
    for rank in group.ranks[1:]:
        _get(group.store, f"{place}/read/{rank}", until)
    time.sleep(TELLING_SECONDS)


def _meeting(group: Group) -> str:
    """The key under which the next meeting of this group is held."""
    members = "-".join(map(str, group.ranks))
    mine = f"{_ROOT}/count/{members}/{group.rank}"
    return f"{_ROOT}/meeting/{members}/{group.store.key_value_increment(mine, 1)}"


def _arrived(
    group: Group,
    place: str,
    ranks: Sequence[int],
    name: str,
    until: float,
    arrival_seconds: float,
) -> dict[int, str]:
    """The facts of ``ranks``, once all have come."""
    said = {r: _get(group.store, f"{place}/facts/{r}", until) for r in ranks}
    found = {r: text for r, text in said.items() if text is not None}
    missing = [r for r in ranks if r not in found]
    if missing:
        raise ProcessError(
            f"{name}: process {spans(missing)} of {spans(group.ranks)} did not come "
            f"within {arrival_seconds:g} seconds. Every process must plan the same "
            "steps in the same order: look for a branch on jax.process_index() around "
            "the step's first call (or planned, init), or for a process that failed"
        )
    return found


def _compare(name: str, facts: Mapping[int, Facts], mend: str) -> None:
    """Raise :class:`ProcessError` unless all have the same facts."""
    found = [
        line
        for key in dict.fromkeys(key for one in facts.values() for key in one)
        for line in _differing(key, {r: one.get(key) for r, one in facts.items()})
    ]
    if found:
        more = [f"and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
        raise ProcessError(
            problems(
                f"{name}: the processes differ:",
                [*found[:_SHOWN], *more],
                mend,
            )
        )


def _differing(key: str, values: Mapping[int, Any]) -> list[str]:
    """Lines that say which process has which value, where not all have one.

    >>> _differing("jax", {0: "0.10.2", 1: "0.11.0", 2: "0.10.2"})
    ['jax: 0.10.2 in process 0,2; 0.11.0 in process 1']
    """
    if any(isinstance(value, dict) for value in values.values()):
        inside = [value or {} for value in values.values()]
        return [
            line
            for name in dict.fromkeys(name for one in inside for name in one)
            for line in _differing(
                f"{key} {name}", {r: (v or {}).get(name) for r, v in values.items()}
            )
        ]
    who: dict[str, list[int]] = {}
    for rank, value in values.items():
        who.setdefault("none" if value is None else str(value), []).append(rank)
    if len(who) == 1:
        return []
    said = [f"{value} in process {spans(ranks)}" for value, ranks in who.items()]
    return [f"{key}: {'; '.join(said)}"]


def _opened(text: str | None, leader: int) -> str:
    """The answer, or the error that the leader published in its place."""
    assert text is not None
    sealed = json.loads(text)
    if "answer" in sealed:
        return str(sealed["answer"])
    kind = getattr(errors, sealed["kind"], None)
    if isinstance(kind, type) and issubclass(kind, RhinoError):
        raise kind(sealed["error"])
    raise ProcessError(
        f"process {leader} failed while it planned for all: "
        f"{sealed['kind']}: {sealed['error']}"
    )


def _set(store: Any, key: str, text: str) -> None:
    store.key_value_set_bytes(
        key, zlib.compress(text.encode(), 1), allow_overwrite=True
    )


def _get(store: Any, key: str, until: float | None) -> str | None:
    """The text under ``key``, waited for; None where it does not come in time.

    With no limit it is waited for as long as the store lives: with process 0 all others
    end.
    """
    while True:
        left = _SLICE_SECONDS if until is None else until - time.monotonic()
        wait_ms = max(1, int(min(left, _SLICE_SECONDS) * 1000))
        try:
            found = store.blocking_key_value_get_bytes(key, wait_ms)
            return zlib.decompress(found).decode()
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
        if until is not None and time.monotonic() >= until:
            return None
