"""A jaxpr read into a Program.

Calls that only wrap other equations (``jit``, custom derivative rules that are done
with) are inlined; loops, branches and rematerialization become ops with Programs of
their own. Constants become extra inputs of the outermost Program, wherever they are
read.
"""

from __future__ import annotations

import enum
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from jax.sharding import PartitionSpec, Sharding

from rhino_jax import compat
from rhino_jax.ir.check import check
from rhino_jax.ir.program import Op, Plain, Program, Value, Where
from rhino_jax.rules import RULES
from rhino_jax.rules.kernels import BLOCKS, KERNEL
from rhino_jax.rules.manual import AXES, SHARD_MAP
from rhino_jax.rules.placing import CONSTRAINTS, OPEN
from rhino_jax.rules.stated import PARAM
from rhino_jax.trace.fallback import fallback_rule, registered_rule
from rhino_jax.trace.hoist import HOIST, Call
from rhino_jax.trace.kernels import kernel_blocks
from rhino_jax.trace.manual import manual_params
from rhino_jax.trace.partitioning import partitioning_rule
from rhino_jax.trace.pools import without_pads
from rhino_jax.trace.rewrite import rewritten

CONVERT = "convert_element_type"
INLINED: Mapping[str, str] = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_lin": "call_jaxpr",
    "call": "call_jaxpr",
    "composite": "jaxpr",
    "custom_partitioning": "call",
    "custom_vmap_call": "call",
    "eval_jaxpr": "call_jaxpr",
    "linear_call": "callee",
    "remat_opt": "fwd_jaxpr",
}
"""Primitives that are read as the equations inside them, by the parameter to read."""

BODIES: Mapping[str, tuple[str, ...]] = {
    "scan": ("jaxpr",),
    "while": ("cond_jaxpr", "body_jaxpr"),
    "cond": ("branches",),
    "remat2": ("jaxpr",),
}
"""Control flow: the parameters that hold nested Programs."""


@dataclass
class _Builder:
    """The Program under construction."""

    values: list[Value] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)

    @staticmethod
    def of(aval: Any, name: str = "") -> Value:
        weak = bool(getattr(aval, "weak_type", False))
        shape = tuple(int(n) for n in getattr(aval, "shape", ()))
        return Value(shape, str(getattr(aval, "dtype", aval)), name, weak=weak)

    def value(self, aval: Any, name: str = "") -> int:
        self.values.append(self.of(aval, name))
        return len(self.values) - 1

    def literal(self, literal: Any) -> int:
        aval = literal.aval
        number = np.asarray(literal.val).item()
        weak = bool(getattr(aval, "weak_type", False))
        self.values.append(
            Value(tuple(aval.shape), str(aval.dtype), literal=number, weak=weak)
        )
        return len(self.values) - 1


def read_jaxpr(
    closed: Any,
    name: str = "step",
    input_names: Sequence[str] = (),
    place: tuple[str, int] = ("", 0),
    rules: Mapping[str, Any] | None = None,
) -> tuple[Program, tuple[Any, ...]]:
    """The Program of a closed jaxpr, and the constants that follow its inputs.

    A constant that is read in several places, nested Programs included, is one input.
    ``place`` is the file and line of what knows none itself, ``rules`` are the user's
    own for ops (:mod:`rhino_jax.extend`).

    Raises:
        RuleError: a rule of the user's does not fit its op.
    """
    closed = compat.without_references(closed)
    builder = _Builder()
    env: dict[Any, int] = {}
    for i, var in enumerate(closed.jaxpr.invars):
        label = input_names[i] if i < len(input_names) else ""
        env[var] = builder.value(var.aval, label)
    reader = _Reader(
        builder,
        dict.fromkeys(env[var] for var in closed.jaxpr.invars),
        place,
        rules or {},
    )
    env.update(reader.constants(closed.jaxpr, closed.consts))
    outputs = reader.equations(closed.jaxpr, env, "")
    program = Program(
        tuple(builder.values),
        tuple(reader.inputs),
        tuple(builder.ops),
        tuple(outputs),
        name,
    )
    return check(program, f"reading {name}"), tuple(reader.consts)


@dataclass
class _Reader:
    builder: _Builder
    inputs: dict[int, None]
    place: tuple[str, int]
    rules: Mapping[str, Any]
    consts: list[Any] = field(default_factory=list)
    known: dict[int, int] = field(default_factory=dict)
    converted: dict[Any, list[int]] = field(default_factory=dict)
    """Inputs in other types, by input and parameters of the conversion."""

    def equations(self, jaxpr: Any, env: dict[Any, int], stack: str) -> list[int]:
        """Read every equation; the numbers of the jaxpr's results."""

        def read(var: Any) -> int:
            if isinstance(var, compat.Literal):
                return self.builder.literal(var)
            return env[var]

        for eqn in without_pads(jaxpr):
            ins = [read(var) for var in eqn.invars]
            kind = eqn.primitive.name
            own = registered_rule(eqn, self.rules, self._named(eqn))
            brought = None if own else partitioning_rule(eqn, self._named(eqn))
            if brought is not None:
                own = brought, eqn
            if own is not None:
                call = Call([], ins, _params(eqn, kind, ()) | {PARAM: own[0].plain})
                outs = self._emit(own[1], kind, call, stack)
            elif (inner := _inner(eqn)) is not None:
                outs = self._inline(eqn, inner, ins, stack)
            elif kind == SHARD_MAP:
                outs = self._manual(eqn, ins, stack)
            else:
                outs = self._op(eqn, kind, ins, stack)
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(var) for var in jaxpr.outvars]

    def constants(self, jaxpr: Any, consts: Sequence[Any]) -> dict[Any, int]:
        """The constants of ``jaxpr`` as inputs of the Program."""
        pairs = zip(jaxpr.constvars, consts, strict=True)
        return {var: self._constant(_Builder.of(var.aval), c) for var, c in pairs}

    def _constant(self, value: Value, const: Any) -> int:
        # JAX keeps one object per closed-over array; self.consts keeps it alive, so
        # its id stays its own.
        if id(const) not in self.known:
            self.builder.values.append(replace(value, name="const"))
            number = len(self.builder.values) - 1
            self.inputs[number] = None
            self.consts.append(const)
            self.known[id(const)] = number
        return self.known[id(const)]

    def _inline(self, eqn: Any, inner: Any, ins: list[int], stack: str) -> list[int]:
        jaxpr, consts = open_jaxpr(inner)
        env = self.constants(jaxpr, consts)
        env.update(zip(jaxpr.invars, ins, strict=True))
        # JAX traces its own jitted functions once, and forgets who called them.
        outer, self.place = self.place, self._line(eqn)
        outs = self.equations(jaxpr, env, _join(stack, compat.name_stack(eqn)))
        self.place = outer
        return outs

    def _line(self, eqn: Any) -> tuple[str, int]:
        """The user's file and line; those of the call it came in by where not known."""
        found = compat.source_line(eqn)
        return found if found[0] else self.place

    def _named(self, eqn: Any) -> str:
        file, line = self._line(eqn)
        return f"{file}:{line}"

    def _op(self, eqn: Any, kind: str, ins: list[int], stack: str) -> list[int]:
        names = BODIES.get(kind, ())
        call = Call([], ins, _params(eqn, kind, names))
        if kind not in RULES and not names:
            stated = fallback_rule(eqn)
            call.params.update({PARAM: stated.plain} if stated else {})
        hoisted: list[list[int]] = []
        for name in names:
            held = eqn.params[name]
            for inner in held if isinstance(held, tuple | list) else (held,):
                closed = compat.close(*open_jaxpr(inner))
                body, consts = read_jaxpr(
                    closed, f"{kind}.{name}", (), self._line(eqn), self.rules
                )
                taken = body.inputs[len(body.inputs) - len(consts) :]
                pairs = zip(taken, consts, strict=True)
                hoisted.append([self._constant(body.values[v], c) for v, c in pairs])
                call.bodies.append(body)
        if any(hoisted):
            call = HOIST[kind](call, hoisted)
        return self._emit(eqn, kind, call, stack)

    def _manual(self, eqn: Any, ins: list[int], stack: str) -> list[int]:
        """A ``shard_map``: what it holds, read for the shapes of one device."""
        closed = compat.close(*open_jaxpr(eqn.params["jaxpr"]))
        local, consts = read_jaxpr(closed, SHARD_MAP, (), self._line(eqn), self.rules)
        taken = local.inputs[len(local.inputs) - len(consts) :]
        pairs = zip(taken, consts, strict=True)
        ins = [*ins, *(self._constant(local.values[v], c) for v, c in pairs)]
        params = manual_params(eqn, local, len(consts))
        params["jaxpr"] = plain(eqn.params["jaxpr"])
        return self._emit(eqn, SHARD_MAP, Call([], ins, params), stack, local)

    def _emit(
        self,
        eqn: Any,
        kind: str,
        call: Call,
        stack: str,
        local: Program | None = None,
    ) -> list[int]:
        outs = [self.builder.value(var.aval) for var in eqn.outvars]
        params = tuple(sorted(call.params.items()))
        if kind == CONVERT and call.operands[0] in self.inputs:
            # Compilers see that equal ones are one, and so that their gathers are.
            first = self.converted.setdefault((*call.operands, params), outs)
            if first is not outs:
                return first
        file, line = self._line(eqn)
        where = Where(file, line, _join(stack, compat.name_stack(eqn)))
        self.builder.ops.append(
            Op(
                kind,
                tuple(call.operands),
                tuple(outs),
                params,
                tuple(call.bodies),
                where,
                eqn,
                tuple(sorted(type(e).__name__ for e in eqn.effects)),
                local,
            )
        )
        return outs


def _inner(eqn: Any) -> Any:
    """The jaxpr that an equation is read as; None where it is an op."""
    kind = eqn.primitive.name
    return eqn.params[INLINED[kind]] if kind in INLINED else rewritten(eqn)


def open_jaxpr(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """The open jaxpr and constants of an open or closed one."""
    if isinstance(jaxpr, compat.ClosedJaxpr):
        return jaxpr.jaxpr, jaxpr.consts
    return jaxpr, ()


def _join(outer: str, inner: str) -> str:
    return "/".join(part for part in (outer, inner) if part)


_SCAN_TREES = ("ft_in", "ft_out")
"""How jax 0.11 says what a scan's operands are; we keep the counts instead."""


def _params(eqn: Any, kind: str, bodies: Sequence[str]) -> dict[str, Plain]:
    """The equation's plain parameters, spelt alike under every JAX version."""
    params = dict(plain_params(eqn.params, (*bodies, *_SCAN_TREES)))
    if kind in CONSTRAINTS:
        name = "sharding" if kind == "sharding_constraint" else "dst_sharding"
        asked = eqn.params[name]
        return {"spec": compat.spec_of(asked, *OPEN), AXES: compat.axes_of(asked)}
    if kind == KERNEL:
        blocks = kernel_blocks(eqn)
        params |= {} if blocks is None else {BLOCKS: blocks}
    if kind == "scan":
        consts, carry = compat.scan_counts(eqn.params)
        params |= {"num_consts": consts, "num_carry": carry}
    return params


def plain_params(
    params: Mapping[str, Any], skip: Sequence[str] = ()
) -> tuple[tuple[str, Plain], ...]:
    """What rules may read of an equation's parameters: numbers, strings, tuples."""
    return tuple(
        (key, plain(value)) for key, value in sorted(params.items()) if key not in skip
    )


def plain(value: Any) -> Plain:
    """A parameter as plain data; what is none is named by its type.

    Two parameters of different meaning stay different where that can be told without
    an address: a jaxpr is known by a hash of its text, a sharding by its text.
    """
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str | complex):
        return value
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, compat.ClosedJaxpr | compat.Jaxpr):
        text = _ADDRESS.sub("", str(value))
        return f"jaxpr:{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    if isinstance(value, Sharding | PartitionSpec):
        return str(value)
    if hasattr(value, "_fields"):
        return tuple((name, plain(getattr(value, name))) for name in value._fields)
    if isinstance(value, tuple | list):
        return tuple(plain(v) for v in value)
    if isinstance(value, Mapping):
        return tuple((str(k), plain(v)) for k, v in sorted(value.items()))
    if isinstance(value, np.dtype) or (
        isinstance(value, type) and issubclass(value, np.generic)
    ):
        return str(np.dtype(value))
    fields = getattr(value, "__dataclass_fields__", None)
    if fields and not isinstance(value, type):
        return tuple((name, plain(getattr(value, name))) for name in fields)
    return f"<{type(value).__name__}>"


_ADDRESS = re.compile(r"0x[0-9a-f]+")
