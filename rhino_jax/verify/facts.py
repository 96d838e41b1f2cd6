"""What a compiler said about a program, as data."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rhino_jax.verify.collectives import HloCollective, traffic_of
from rhino_jax.verify.hlo import read

Outcome = Literal["ok", "refused", "crashed", "timeout"]
FORMAT = 1


@dataclass(frozen=True)
class CompiledMemory:
    """Bytes on each device. ``peak_bytes`` is 0 where the compiler gives none."""

    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temp_bytes: int
    generated_code_bytes: int
    peak_bytes: int

    @property
    def live_bytes(self) -> int:
        """Arguments, results that share no argument's memory, and temporaries."""
        return (
            self.argument_bytes + self.output_bytes - self.alias_bytes + self.temp_bytes
        )


@dataclass(frozen=True)
class OutOfMemory:
    """A refusal for lack of memory: what was needed and what there is, per device."""

    needed_bytes: int
    available_bytes: int


@dataclass(frozen=True)
class CompiledFacts:
    """What came of compiling one program for one target.

    Attributes:
        outcome: "ok"; "refused" (the compiler raised an error: see ``message`` and
            ``out_of_memory``); "crashed" (its process died); "timeout".
        message: the last lines of what the compiler said; "" when all went well.
        flops_once: the compiler's count of floating-point operations on one device,
            with **loop bodies counted once**; None where it counts none (GPU).
        hlo: the whole text of the compiled module; "" unless the outcome is "ok".
        from_cache: whether it was read from disk. Source lines are then those of the
            first compile: programs that differ in nothing but lines share facts.
    """

    outcome: Outcome
    target: str
    device_count: int
    compiler: str
    compiler_version: str
    message: str = ""
    out_of_memory: OutOfMemory | None = None
    memory: CompiledMemory | None = None
    flops_once: float | None = None
    compile_seconds: float = 0.0
    hlo: str = ""
    from_cache: bool = False

    @property
    def ok(self) -> bool:
        """Whether the compiler accepted the program."""
        return self.outcome == "ok"

    @functools.cached_property
    def collectives(self) -> tuple[HloCollective, ...]:
        """Every collective of one execution, read from ``hlo``."""
        return read(self.hlo) if self.hlo else ()

    def traffic(self, mesh_shape: Mapping[str, int]) -> dict[str, int]:
        """Wire bytes a device and execution, by axes key ("d", "d,t")."""
        return traffic_of(self.collectives, mesh_shape)

    @property
    def unknown_trips(self) -> tuple[HloCollective, ...]:
        """Collectives in loops whose trip count the text does not tell (counted 1)."""
        return tuple(one for one in self.collectives if not one.trip_known)

    def to_json(self) -> str:
        """The facts as JSON; ``from_json`` gives them back equal."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)})

    @staticmethod
    def from_json(text: str) -> CompiledFacts:
        """Read what ``to_json`` wrote.

        Raises:
            ValueError: damaged, or of another format.
        """
        data = json.loads(text)
        if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
            raise ValueError(f"these are no compiled facts of format {FORMAT}")
        try:
            return _facts(data)
        except (TypeError, KeyError, AttributeError) as fault:
            raise ValueError(f"damaged compiled facts: {fault}") from fault


def _facts(data: dict[str, Any]) -> CompiledFacts:
    out_of_memory, memory = data.pop("out_of_memory"), data.pop("memory")
    return CompiledFacts(
        **data,
        out_of_memory=OutOfMemory(**out_of_memory) if out_of_memory else None,
        memory=CompiledMemory(**memory) if memory else None,
    )


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?\b")
_SCALE = {"": 1, "K": 1024, "M": 1024**2, "G": 1024**3, "T": 1024**4}
_EXHAUSTED = re.compile(r"RESOURCE_EXHAUSTED|Ran out of memory|[Oo]ut of memory")
_NEEDED = re.compile(rf"(?:required[^(\d]*\(?|Used ){_SIZE.pattern}")
_AVAILABLE = re.compile(rf"(?:available[^(\d]*\(?|of ){_SIZE.pattern}")


def out_of_memory(message: str) -> OutOfMemory | None:
    """The numbers of a refusal for lack of memory; None for any other message.

    Zero stands for a number the message does not give.

    >>> out_of_memory("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory "
    ...     "required for HLO temporaries (2.00G) exceeds available HBM (1.50G).")
    OutOfMemory(needed_bytes=2147483648, available_bytes=1610612736)
    """
    if not _EXHAUSTED.search(message):
        return None
    needed, available = _NEEDED.search(message), _AVAILABLE.search(message)
    return OutOfMemory(_size_bytes(needed), _size_bytes(available))


def _size_bytes(found: re.Match[str] | None) -> int:
    return int(float(found.group(1)) * _SCALE[found.group(2)]) if found else 0
