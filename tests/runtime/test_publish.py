"""Processes that meet: threads here, over a store like that of jax.distributed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from rhino_jax.compat import KeyValues
from rhino_jax.errors import InfeasibleError, ProcessError
from rhino_jax.runtime import publish
from rhino_jax.runtime.publish import Group, agreed

MEND = "Start them alike."


class Store(KeyValues):
    """The store, in memory."""

    changed: threading.Condition

    def __init__(self) -> None:
        super().__init__({})
        object.__setattr__(self, "changed", threading.Condition())

    def set(self, key: str, value: bytes) -> None:
        with self.changed:
            self.client[key] = value
            self.changed.notify_all()

    def get(self, key: str, seconds: float) -> bytes | None:
        with self.changed:
            self.changed.wait_for(lambda: key in self.client, seconds)
            return self.client.get(key)

    def count(self, key: str) -> int:
        with self.changed:
            self.client[key] = self.client.get(key, 0) + 1
            return int(self.client[key])


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "READING_SECONDS", 0.2)
    monkeypatch.setattr(publish, "TELLING_SECONDS", 0.0)


def meet(
    facts: Mapping[int, Any],
    make: Callable[[], str] = lambda: "a plan",
    late: Mapping[int, float] | None = None,
    patience: float = 5.0,
    store: Store | None = None,
) -> dict[int, Any]:
    """What each of the processes gets: the answer, or what it raises."""
    ranks = tuple(facts)
    kept = store or Store()

    def one(rank: int) -> Any:
        time.sleep((late or {}).get(rank, 0.0))
        group = Group(kept, ranks, rank)
        try:
            return agreed(group, "planning step", facts[rank], make, MEND, patience)
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(ranks)) as pool:
        return dict(zip(ranks, pool.map(one, ranks), strict=True))


def test_the_first_makes_it_and_all_get_it() -> None:
    made: list[int] = []

    def make() -> str:
        made.append(threading.get_ident())
        return f"plan {len(made)}"

    store = Store()
    same = {rank: {"jax": "0.10.2"} for rank in (2, 3, 5)}
    assert set(meet(same, make, store=store).values()) == {"plan 1"}
    assert set(meet(same, make, {2: 0.1}, store=store).values()) == {"plan 2"}


def test_all_are_refused_by_who_has_what() -> None:
    facts = {
        r: {"package": {"jax": "0.10.2", "numpy": "2"}, "program": "abc"}
        for r in range(4)
    }
    facts[2] = {"package": {"jax": "0.11.0"}, "program": "abc"}
    for error in meet(facts).values():
        assert isinstance(error, ProcessError)
        assert "package jax: 0.10.2 in process 0-1,3; 0.11.0 in process 2" in str(error)
        assert "package numpy: 2 in process 0-1,3; none in process 2" in str(error)
        assert "program" not in str(error) and str(error).endswith(MEND)


def test_what_stops_the_first_stops_all() -> None:
    def infeasible() -> str:
        raise InfeasibleError("3 GiB short")

    found = meet({0: {}, 1: {}}, infeasible)
    assert [(type(e), str(e)) for e in found.values()] == [
        (InfeasibleError, "3 GiB short")
    ] * 2

    def broken() -> str:
        raise KeyError("lost")

    found = meet({0: {}, 1: {}}, broken)
    assert isinstance(found[0], KeyError)
    assert isinstance(found[1], ProcessError)
    assert "process 0 failed while it planned for all: KeyError" in str(found[1])


@pytest.mark.parametrize("absent", [0, 1])
def test_who_did_not_come_is_named_and_refused_when_it_does(absent: int) -> None:
    found = meet({0: {}, 1: {}, 2: {}}, late={absent: 0.6}, patience=0.2)
    for rank, error in found.items():
        assert isinstance(error, ProcessError)
        if rank != absent:
            assert f"process {absent} of 0-2 did not come within 0.2" in str(error)
    gone = "gave up waiting in process 1-2" if absent == 0 else "did not come"
    assert gone in str(found[absent])
