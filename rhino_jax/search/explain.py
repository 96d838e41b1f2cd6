"""Why an input lies as it does: what every other layout of it would have cost.

Each alternative is fixed in turn and everything else is searched again around the plan,
so that its price is that of the best plan that has it, not of a plan that was made for
another layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from rhino_jax.cost.reshard import local_bytes
from rhino_jax.ir.layout import Layout
from rhino_jax.ir.staged import Staged
from rhino_jax.search.descend import Start, descend, starts
from rhino_jax.search.domains import Meaning, Slots
from rhino_jax.search.energy import Energy
from rhino_jax.search.planner import Request, energy_of, read
from rhino_jax.search.subject import Subject

MOST = 12


@dataclass(frozen=True)
class Alternative:
    """One layout of an input: the best plan's seconds with it, and its bytes.

    ``seconds`` are those the search sees: ops and collectives one after the other.
    """

    layout: Layout
    seconds: float
    input_bytes: int
    chosen: bool = False


@dataclass(frozen=True)
class Explanation:
    """The alternatives of one input, the cheapest first, and who reads it.

    ``forced`` says what left no choice, if something did.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    alternatives: tuple[Alternative, ...]
    readers: tuple[str, ...]
    forced: str = ""


def explain(
    subject: Subject,
    request: Request,
    position: int,
    chosen: Layout,
    staged: Mapping[int, Staged] = MappingProxyType({}),
) -> Explanation:
    """What else the input at ``position`` could have been.

    Args:
        request: mesh, prices, price of memory and pins of the plan.
        chosen: its layout in the plan.
        staged: scans (ops) that are pipelined in the plan.
    """
    reading = read(subject, staged)
    energy = energy_of(reading, request)
    var = energy.graph.inputs[position]
    found = []
    for layout in _layouts(energy, var, chosen):
        fixed = Request(
            request.mesh,
            request.prices,
            request.memory_weight,
            request.replicate_heavy,
            request.pins,
            placed={**request.placed, position: layout},
        )
        ticks = _best(energy_of(reading, fixed), request)
        value = energy.graph.vars[var]
        held = local_bytes(value.shape, value.dtype, layout, request.mesh)
        seconds = ticks / request.prices.ticks_per_second
        found.append(Alternative(layout, seconds, held, layout == chosen))
    program = subject.program
    v = program.inputs[position]
    readers = tuple(
        dict.fromkeys(
            f"{program.ops[i].kind} at {program.ops[i].where}"
            for i in program.uses.get(v, ())
        )
    )
    fixed_by = energy.graph.vars[var].fixed is not None
    return Explanation(
        subject.input_paths[position],
        subject.shape(position),
        program.values[v].dtype,
        tuple(sorted(found, key=lambda one: (one.seconds, not one.chosen))),
        readers,
        "a pin fixes it" if fixed_by else "",
    )


def _layouts(energy: Energy, var: int, chosen: Layout) -> list[Layout]:
    """The chosen layout and those that split at most one dimension an axis."""
    kind = energy.kinds[var]
    slots: list[Slots] = [()]
    for axis in energy.mesh.names:
        slots = [(*before, slot) for before in slots for slot in kind.options(axis)]
    meanings: list[Meaning | None] = [kind.meaning(one) for one in slots]
    layouts = [chosen, *(m.gives[0] for m in meanings if m is not None)]
    return list(dict.fromkeys(layouts))[:MOST]


def _best(energy: Energy, request: Request) -> int:
    ticks = request.memory_weight * request.prices.ticks_per_second
    axes = [i for i, axis in enumerate(energy.mesh.axes) if axis.size > 1]
    start: Start = starts(energy)[0]
    return descend(energy, start, axes, ticks).ticks
