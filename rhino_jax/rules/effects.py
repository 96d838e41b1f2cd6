"""Calls out of the program: into Python, and into code that JAX does not see into.

What they read and give is whole. One that may be called any number of times
(``pure_callback``) is called by every device; one that has an effect is called once,
by the first device, and what it gives is sent to the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rhino_jax.ir.factors import Rule
from rhino_jax.ir.program import Op, Value
from rhino_jax.rules.notation import RuleFn, whole

ONCE = frozenset(("io_callback", "debug_callback", "debug_print"))
"""Primitives that the first device alone runs."""


def _whole(op: Op, reads: Sequence[Value], makes: Sequence[Value]) -> Rule:
    return whole(reads, makes)


RULES: Mapping[str, RuleFn] = {
    **dict.fromkeys(ONCE, _whole),
    "pure_callback": _whole,
    "ffi_call": _whole,
    "platform_index": _whole,
}
