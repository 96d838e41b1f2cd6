"""Every primitive that JAX's public functions are made of, and what Rhino makes of it.

``python -m benchmarks.primitives`` traces the functions of
:mod:`benchmarks.functions` and writes ``docs/primitives.md``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import jax

from benchmarks.functions import steps
from rhino_jax.ir.program import Op
from rhino_jax.rules import RULES, rule_of
from rhino_jax.rules.registry import FAMILIES
from rhino_jax.rules.stated import stated_in
from rhino_jax.trace.reader import BODIES, INLINED, read_jaxpr
from rhino_jax.trace.rewrite import REWRITES

PLACE = Path(__file__).parent.parent / "docs" / "primitives.md"

HEAD = """# Primitives

Written by `python -m benchmarks.primitives`, which traces {functions} public functions
of JAX {version}. For every primitive: the family (`rhino_jax/rules/`, with its local
form of the same name in `rhino_jax/lower/local/`), and its rule where it was met
with the most dimensions.

A rule is read like an einsum: a letter is one loop, `(ab)` a dimension that is a
product. A letter with nothing said of it is *parallel*. *reduction=sum*: a split leaves
terms of a sum. *indexed*: a shard answers for the positions that it holds.
*positional*: a shard needs to know where it lies. *ring*: shards of some operands go
around all devices. *window*: a block reads a few elements of its neighbours', who send
them. *blocked*: must be whole. What no family knows is planned by
fallback: Shardy's rules of its parts, tried loop by loop
(`rhino_jax/trace/fallback.py`), or it is whole, and the plan says so. Where our rules
and Shardy's differ, `tests/rules/test_against_shardy.py` lists both with the reason.
"""


@dataclass
class Census:
    """What was met: primitive -> how it is planned, and the rule where it is an op."""

    functions: int = 0
    rules: dict[str, str] = field(default_factory=dict)
    how: dict[str, str] = field(default_factory=dict)

    @property
    def without_a_rule(self) -> list[str]:
        return [kind for kind, how in self.how.items() if how == "whole, no rule"]


def how(op: Op) -> str:
    """How an op of this kind is planned."""
    if op.kind in RULES:
        return "whole" if RULES[op.kind].__name__ == "_whole" else "by hand"
    stated = stated_in(op)
    return stated.origin if stated else "whole, no rule"


def census() -> Census:
    """Trace every function of the table."""
    found = Census()
    for _, closed in steps():
        found.functions += 1
        program, _ = read_jaxpr(closed)
        for inner, op in program.walk():
            if op.programs:
                continue
            text = rule_of(inner, op).text
            if len(text) > len(found.rules.get(op.kind, "")):
                found.rules[op.kind] = text
                found.how[op.kind] = how(op)
    return found


def markdown(found: Census) -> str:
    """The text of ``docs/primitives.md``."""
    lines = [HEAD.format(functions=found.functions, version=jax.__version__)]
    for family in FAMILIES:
        name = family.__name__.rsplit(".", 1)[-1]
        lines += [f"## {name}", "", "| primitive | planned | rule |", "|---|---|---|"]
        for kind in sorted(family.RULES):
            rule = found.rules.get(kind)
            planned = how(Op(kind, (), ()))
            shown = f"`{rule}`" if rule else "(in no function of the table)"
            lines.append(f"| {kind} | {planned} | {shown} |")
        lines.append("")
    others = sorted(set(found.rules) - set(RULES))
    lines += ["## What no family knows", ""]
    lines += [f"- {kind}: {found.how[kind]}: `{found.rules[kind]}`" for kind in others]
    lines += ["" if others else "Nothing of the table.\n"]
    lines += ["## What holds other equations", ""]
    lines.append(f"- Loops and branches, planned inside: {_names(BODIES)}.")
    lines.append(f"- Read as the equations inside: {_names(INLINED)}.")
    lines.append(
        f"- Read as what they do, in other primitives: {_names(REWRITES)} (a `while` "
        "only under `vmap`), and mutable references made inside the step."
    )
    lines.append(
        "- Run as they are written: `shard_map` over the axes that it names, "
        "`custom_partitioning` by the rule that it may bring."
    )
    lines.append(
        "- Refused, with what to write instead: side effects with `ordered=True`, "
        "mutable references from outside the step."
    )
    return "\n".join(lines) + "\n"


def _names(kinds: object) -> str:
    return ", ".join(f"`{kind}`" for kind in sorted(kinds))  # type: ignore[call-overload]


if __name__ == "__main__":
    PLACE.write_text(markdown(census()))
    print(f"{PLACE} written")
