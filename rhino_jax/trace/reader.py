"""A jaxpr read into a Program.

Calls that only wrap other equations (``jit``, custom derivative rules that are done
with) are inlined; loops, branches and rematerialization become ops with Programs of
their own. Constants become extra inputs.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rhino_jax import compat
from rhino_jax.ir.check import check
from rhino_jax.ir.program import Op, Plain, Program, Value, Where

INLINED: Mapping[str, str] = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_lin": "call_jaxpr",
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

    def value(self, aval: Any, name: str = "") -> int:
        weak = bool(getattr(aval, "weak_type", False))
        shape = tuple(int(n) for n in getattr(aval, "shape", ()))
        dtype = str(getattr(aval, "dtype", aval))
        self.values.append(Value(shape, dtype, name, weak=weak))
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
    closed: Any, name: str = "step", input_names: Sequence[str] = ()
) -> tuple[Program, tuple[Any, ...]]:
    """The Program of a closed jaxpr, and the constants that follow its inputs."""
    builder = _Builder()
    consts: list[Any] = []
    env: dict[Any, int] = {}
    for i, var in enumerate(closed.jaxpr.invars):
        label = input_names[i] if i < len(input_names) else ""
        env[var] = builder.value(var.aval, label)
    inputs = [env[var] for var in closed.jaxpr.invars]
    for var, const in zip(closed.jaxpr.constvars, closed.consts, strict=True):
        env[var] = builder.value(var.aval, "const")
        inputs.append(env[var])
        consts.append(const)
    reader = _Reader(builder, inputs, consts)
    outputs = reader.equations(closed.jaxpr, env, "")
    program = Program(
        tuple(builder.values),
        tuple(inputs),
        tuple(builder.ops),
        tuple(outputs),
        name,
    )
    return check(program, f"reading {name}"), tuple(consts)


@dataclass
class _Reader:
    builder: _Builder
    inputs: list[int]
    consts: list[Any]

    def equations(self, jaxpr: Any, env: dict[Any, int], stack: str) -> list[int]:
        """Read every equation; the numbers of the jaxpr's results."""

        def read(var: Any) -> int:
            if isinstance(var, compat.Literal):
                return self.builder.literal(var)
            return env[var]

        for eqn in jaxpr.eqns:
            ins = [read(var) for var in eqn.invars]
            kind = eqn.primitive.name
            if kind in INLINED:
                outs = self._inline(eqn, eqn.params[INLINED[kind]], ins, stack)
            else:
                outs = self._op(eqn, kind, ins, stack)
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(var) for var in jaxpr.outvars]

    def _inline(self, eqn: Any, inner: Any, ins: list[int], stack: str) -> list[int]:
        jaxpr, consts = open_jaxpr(inner)
        env = dict(zip(jaxpr.constvars, self._constants(jaxpr, consts), strict=True))
        env.update(zip(jaxpr.invars, ins, strict=True))
        return self.equations(jaxpr, env, _join(stack, compat.name_stack(eqn)))

    def _constants(self, jaxpr: Any, consts: Sequence[Any]) -> list[int]:
        numbers = []
        for var, const in zip(jaxpr.constvars, consts, strict=True):
            number = self.builder.value(var.aval, "const")
            self.inputs.append(number)
            self.consts.append(const)
            numbers.append(number)
        return numbers

    def _op(self, eqn: Any, kind: str, ins: list[int], stack: str) -> list[int]:
        names = BODIES.get(kind, ())
        bodies = []
        extra: list[int] = []
        for name in names:
            held = eqn.params[name]
            for inner in held if isinstance(held, tuple | list) else (held,):
                jaxpr, consts = open_jaxpr(inner)
                closed = compat.close(jaxpr, consts)
                body, more = read_jaxpr(closed, f"{kind}.{name}")
                if more:
                    body, numbers = self._hoist(body, more)
                    extra.append(len(numbers))
                    assert kind == "scan", f"constants inside {kind} are not hoisted"
                    count = eqn.params["num_consts"]
                    ins = [*numbers, *ins]
                    bodies.append(_consts_first(body, len(more)))
                    params = dict(plain_params(eqn.params, names))
                    params["num_consts"] = count + len(more)
                    return self._emit(eqn, kind, ins, params, tuple(bodies), stack)
                bodies.append(body)
        params = dict(plain_params(eqn.params, names))
        return self._emit(eqn, kind, ins, params, tuple(bodies), stack)

    def _hoist(self, body: Program, consts: Sequence[Any]) -> tuple[Program, list[int]]:
        """Constants of a body become inputs of the Program around it."""
        numbers = []
        for value, const in zip(
            body.inputs[len(body.inputs) - len(consts) :], consts, strict=True
        ):
            self.builder.values.append(body.values[value])
            number = len(self.builder.values) - 1
            self.inputs.append(number)
            self.consts.append(const)
            numbers.append(number)
        return body, numbers

    def _emit(
        self,
        eqn: Any,
        kind: str,
        ins: list[int],
        params: dict[str, Plain],
        bodies: tuple[Program, ...],
        stack: str,
    ) -> list[int]:
        outs = [self.builder.value(var.aval) for var in eqn.outvars]
        file, line = compat.source_line(eqn)
        where = Where(file, line, _join(stack, compat.name_stack(eqn)))
        self.builder.ops.append(
            Op(
                kind,
                tuple(ins),
                tuple(outs),
                tuple(sorted(params.items())),
                bodies,
                where,
                eqn,
                tuple(sorted(str(e) for e in eqn.effects)),
            )
        )
        return outs


def open_jaxpr(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """The open jaxpr and constants of an open or closed one."""
    if isinstance(jaxpr, compat.ClosedJaxpr):
        return jaxpr.jaxpr, jaxpr.consts
    return jaxpr, ()


def _consts_first(body: Program, count: int) -> Program:
    """The inputs that were constants, in front of the others (as a scan wants)."""
    keep = len(body.inputs) - count
    inputs = (*body.inputs[keep:], *body.inputs[:keep])
    return Program(body.values, inputs, body.ops, body.outputs, body.name)


def _join(outer: str, inner: str) -> str:
    return "/".join(part for part in (outer, inner) if part)


def plain_params(
    params: Mapping[str, Any], skip: Sequence[str] = ()
) -> tuple[tuple[str, Plain], ...]:
    """What rules may read of an equation's parameters: numbers, strings, tuples."""
    return tuple(
        (key, plain(value)) for key, value in sorted(params.items()) if key not in skip
    )


def plain(value: Any) -> Plain:
    """A parameter as plain data; what is none is named by its type."""
    if value is None or isinstance(value, bool | int | float | str | complex):
        return value
    if isinstance(value, enum.Enum):
        return value.name
    if hasattr(value, "_fields"):
        return tuple((name, plain(getattr(value, name))) for name in value._fields)
    if isinstance(value, tuple | list):
        return tuple(plain(v) for v in value)
    if isinstance(value, Mapping):
        return tuple((str(k), plain(v)) for k, v in sorted(value.items()))
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.dtype) or (
        isinstance(value, type) and issubclass(value, np.generic)
    ):
        return str(np.dtype(value))
    fields = getattr(value, "__dataclass_fields__", None)
    if fields and not isinstance(value, type):
        return tuple((name, plain(getattr(value, name))) for name in fields)
    return f"<{type(value).__name__}>"
