"""Shard, run, recombine for every primitive of JAX's public functions.

``python -m tests.lower.local.sweep`` takes of every primitive in the table of
:mod:`benchmarks.functions` the op with the most dimensions, splits each of its factors
alone and in pairs (in blocks, strided, ragged; with flows), and compares with the op
itself. Primitives may be named: ``python -m tests.lower.local.sweep sort gather``.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from typing import Any

import jax
import numpy as np

from benchmarks.functions import steps
from rhino_jax.ir.factors import BLOCKED
from rhino_jax.ir.mesh import Mesh
from rhino_jax.ir.program import Op, Program, Value
from rhino_jax.lower.devices import device_mesh
from rhino_jax.rules import rule_of
from rhino_jax.rules.effects import ONCE
from rhino_jax.trace.reader import read_jaxpr
from tests.lower.local.harness import alone_and_in_pairs, check_choices

MESH = Mesh.of(x=2, y=4)
MOST_CHOICES = 16
UNCERTAIN = frozenset(("eig", "eigh", "schur", "svd", "rng_uniform", *ONCE))
"""Vectors of any sign, numbers from nowhere, effects: the op twice may differ."""


def cases(kinds: Collection[str] = ()) -> Iterator[tuple[str, Program]]:
    """Primitive, and the Program of one op of it, the one with the most to split."""
    best: dict[str, tuple[int, Program]] = {}
    for _, closed in steps():
        program, _ = read_jaxpr(closed)
        for inner, op in program.walk():
            if op.programs or op.kind in UNCERTAIN or (kinds and op.kind not in kinds):
                continue
            if any(v.size > 4096 for v in inner.operand_values(op)):
                continue
            rule = rule_of(inner, op)
            free = sum(f.kind != BLOCKED and f.size > 1 for f in rule.factors)
            if free > best.get(op.kind, (0, None))[0]:
                best[op.kind] = free, _alone(inner, op)
    for kind, (_, program) in sorted(best.items()):
        yield kind, program


def _alone(program: Program, op: Op) -> Program:
    values = dict.fromkeys(op.operands)
    inputs = tuple(v for v in values if program.values[v].literal is None)
    return Program(program.values, inputs, (op,), op.results)


def arguments(program: Program) -> list[Any]:
    """Arrays for its inputs: small numbers, and matrices that have factors."""
    rng = np.random.default_rng(0)
    return [_array(rng, program.values[v]) for v in program.inputs]


def _array(rng: np.random.Generator, value: Value) -> Any:
    shape = value.shape
    if value.dtype.startswith("key<"):
        impl = {"fry": "threefry2x32"}.get(value.dtype[4:-1], value.dtype[4:-1])
        return jax.random.split(jax.random.key(0, impl=impl), shape)
    if value.dtype == "bool":
        return rng.random(shape) < 0.5
    dtype = np.dtype(value.dtype)
    if dtype.kind in "iu":
        return rng.integers(0, 4, shape).astype(dtype)
    drawn = rng.uniform(0.1, 0.9, shape)
    if len(shape) > 1 and shape[-1] == shape[-2]:
        drawn = drawn + np.swapaxes(drawn, -1, -2) + 4 * np.eye(shape[-1])
    return drawn.astype(dtype)


def check_kind(program: Program, jax_mesh: Any, most: int = MOST_CHOICES) -> int:
    """Every factor alone, and as many pairs as there is room for; how many choices."""
    (op,) = program.ops
    choices = alone_and_in_pairs(rule_of(program, op), MESH)
    step = max(1, len(choices) // most)
    some = choices[::step]
    check_choices(program, some, MESH, jax_mesh, arguments(program), rtol=1e-4)
    return len(some)


def main() -> None:
    jax.config.update("jax_num_cpu_devices", MESH.num_devices)
    jax_mesh = device_mesh(MESH)
    failed, count = [], 0
    for kind, program in cases(sys.argv[1:]):
        try:
            count += check_kind(program, jax_mesh)
        except Exception as error:  # the sweep goes on, and lists it
            failed.append(kind)
            print(f"{kind}: {type(error).__name__}: {str(error)[:2000]}", flush=True)
    print(f"{count} choices, {len(failed)} primitives failed: {' '.join(failed)}")


if __name__ == "__main__":
    main()
