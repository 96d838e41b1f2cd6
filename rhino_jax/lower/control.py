"""Loops and branches bound again around new bodies, for both lowerings.

A body is a function of the op's inner arrays; it runs a nested Program, on shards or
under constraints.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax import lax

from rhino_jax import compat
from rhino_jax.ir.program import Op

Arrays = Sequence[jax.Array]
Body = Callable[..., list[jax.Array]]


def _scan(op: Op, bodies: Sequence[Body], args: Arrays) -> Arrays:
    (body,) = bodies
    consts, carry = op.param["num_consts"], op.param["num_carry"]

    def step(held: tuple[jax.Array, ...], xs: tuple[jax.Array, ...]) -> Any:
        outs = body(*args[:consts], *held, *xs)
        return tuple(outs[:carry]), tuple(outs[carry:])

    held, ys = lax.scan(
        step,
        tuple(args[consts : consts + carry]),
        tuple(args[consts + carry :]),
        length=op.param["length"],
        reverse=op.param["reverse"],
        unroll=op.param["unroll"],
    )
    return [*held, *ys]


def _while(op: Op, bodies: Sequence[Body], args: Arrays) -> Arrays:
    test, body = bodies
    split = op.param["cond_nconsts"]
    consts = op.param["body_nconsts"]
    out = lax.while_loop(
        lambda held: test(*args[:split], *held)[0],
        lambda held: tuple(body(*args[split : split + consts], *held)),
        tuple(args[split + consts :]),
    )
    return list(out)


def _cond(op: Op, bodies: Sequence[Body], args: Arrays) -> Arrays:
    index, rest = args[0], args[1:]
    return list(lax.switch(index.astype("int32"), list(bodies), *rest))


def _remat(op: Op, bodies: Sequence[Body], args: Arrays) -> Arrays:
    # Bound again rather than wrapped in jax.checkpoint, which would forget that the
    # equation is already differentiated, and with that its barriers.
    closed = jax.make_jaxpr(bodies[0])(*compat.local_avals(args))
    jaxpr, consts = compat.without_constants(closed)
    return list(compat.bind(op.source, (*consts, *args), {"jaxpr": jaxpr}))


CONTROL: Mapping[str, Callable[[Op, Sequence[Body], Arrays], Arrays]] = {
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "remat2": _remat,
}
