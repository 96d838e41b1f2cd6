"""What nobody reads goes, from loops and ``remat2`` too."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from rhino_jax.ir.check import check
from rhino_jax.ir.prune import pruned
from rhino_jax.trace import trace

F = jax.ShapeDtypeStruct((3, 4), jnp.float32)


def test_a_scan_is_handed_and_stacks_what_is_read() -> None:
    def step(xs: Any, ys: Any, once: Any) -> Any:
        def turn(carry: Any, given: Any) -> Any:
            x, y = given
            return carry + x, (jnp.sin(x), jnp.cos(y) * once)

        total, (kept, _) = lax.scan(turn, jnp.zeros(4), (xs, ys))
        return total, kept

    program = trace(step, (F, F, jax.ShapeDtypeStruct((4,), jnp.float32))).program
    after = check(pruned(program))
    (before,) = (op for op in program.ops if op.kind == "scan")
    (scan,) = (op for op in after.ops if op.kind == "scan")
    assert (len(before.operands), len(before.results)) == (4, 3)
    assert (len(scan.operands), len(scan.results)) == (2, 2)
    assert (scan.param["num_consts"], scan.param["num_carry"]) == (0, 1)
    assert [op.kind for op in scan.programs[0].ops] == ["add", "sin"]
    assert (after.inputs, after.outputs) == (program.inputs, program.outputs)


def test_effects_stay() -> None:
    def step(x: Any) -> Any:
        jax.debug.print("{}", jnp.sum(x))
        jnp.cos(x)
        return x

    after = pruned(trace(step, (F,)).program)
    summed, shown = after.ops
    assert (summed.kind, bool(shown.effects)) == ("reduce_sum", True)


def test_what_is_made_again_and_not_read() -> None:
    def step(x: Any, y: Any) -> Any:
        def loss(x: Any) -> Any:
            return jnp.sum(jax.checkpoint(lambda x: jnp.sin(jnp.sin(x)))(x))

        return jax.grad(loss)(x)

    after = check(pruned(trace(step, (F, F)).program))
    (again,) = (op for op in after.ops if op.kind == "remat2")
    assert len(again.programs[0].ops) == 5  # sin, cos, cos and two products
