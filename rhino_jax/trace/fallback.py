"""Rules for ops that no family knows: the user's, or Shardy's for their parts.

An op without a rule is lowered alone, Shardy's rules of its instructions are composed
(:mod:`rhino_jax.trace.shardy`), and of the loops so found those are kept that a shard
may run by itself: parallel ones on which nothing in the op's parameters depends. That
is tried, loop by loop: lowered for the sizes of a shard, the op must be the same
program, types aside. A mean's divisor, a slice's bounds would differ.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from rhino_jax import compat
from rhino_jax.errors import RuleError
from rhino_jax.ir.factors import BLOCKED, PARALLEL, Dims, Factor, Rule
from rhino_jax.ir.program import Op, Value
from rhino_jax.rules.stated import FALLBACK, REGISTERED, Stated, rule_in
from rhino_jax.trace.shardy import shardy_rule

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


def names_of(eqn: Any) -> tuple[str, ...]:
    """What a rule may call ``eqn``: its primitive, its kernel, target or function."""
    params = eqn.params
    found = [params.get("name"), params.get("target_name")]
    found.append(getattr(params.get("name_and_src_info"), "name", None))
    own = [name for name in found if isinstance(name, str)]
    return (*own, eqn.primitive.name)


def registered_rule(
    eqn: Any, rules: Mapping[str, Any], place: str
) -> tuple[Stated, Any] | None:
    """The user's rule for ``eqn``, and the equation that its local form runs.

    Raises:
        RuleError: the rule contradicts the shapes, or no shard can be run as it stands.
    """
    name = next((n for n in names_of(eqn) if n in rules), None)
    if name is None:
        return None
    given = rules[name]
    stated = Stated(REGISTERED, given.text)
    try:
        rule = rule_in(stated, *_values(eqn))
    except RuleError as error:
        raise RuleError(
            f"{place}: the rule of {name!r} does not fit: {error}"
        ) from None
    if given.local is not None:
        return stated, compat.with_form(eqn, given.local)
    for factor in rule.factors:
        if factor.traits.split and factor.size > 1 and eqn.primitive.name != "ffi_call":
            wrong = _wrong_on_a_shard(eqn, rule, factor)
            if wrong:
                raise RuleError(
                    f"{place}: {name!r} can not run on a shard of factor "
                    f"{factor.name!r} as it stands: {wrong}. Give "
                    f"register_rule({name!r}, ..., local=), a function of a shard's "
                    "arrays"
                )
    return stated, eqn


def fallback_rule(eqn: Any) -> Stated | None:
    """The rule of an op that no family knows; None where it must run whole."""
    if eqn.effects:
        return None
    try:
        found = shardy_rule(Op(eqn.primitive.name, (), (), source=eqn))
        whole = _program_text(eqn, [v.aval.shape for v in eqn.invars])
    except Exception:
        # No lowering for this machine, keys, several functions: any of a hundred
        # reasons, and in each the op runs whole, and the plan says so.
        return None
    kept = {
        f.name
        for f in found.factors
        if f.kind == PARALLEL and f.size > 1 and _is_loop(eqn, found, f, whole)
    }
    if not kept or len(found.factors) > len(LETTERS):
        return None
    return _stated(found, kept)


def _stated(rule: Rule, kept: set[str]) -> Stated:
    short = dict(zip((f.name for f in rule.factors), LETTERS, strict=False))

    def renamed(values: Sequence[Dims]) -> tuple[Dims, ...]:
        return tuple(
            tuple(tuple(short[n] for n in dim) for dim in dims) for dims in values
        )

    factors = tuple(
        Factor(short[f.name], f.size, PARALLEL if f.name in kept else BLOCKED)
        for f in rule.factors
    )
    plain = Rule(factors, renamed(rule.operands), renamed(rule.results))
    return Stated(FALLBACK, plain.text, tuple((f.name, f.size) for f in factors))


def _values(eqn: Any) -> tuple[list[Value], list[Value]]:
    reads, makes = (
        [Value(tuple(v.aval.shape), str(v.aval.dtype)) for v in side]
        for side in (eqn.invars, eqn.outvars)
    )
    return reads, makes


def _shapes_on_a_shard(
    values: Sequence[Dims], rule: Rule, factor: Factor
) -> list[tuple[int, ...]]:
    """The shapes where ``factor`` is split in as few parts as can be."""
    parts = next(n for n in range(2, factor.size + 1) if factor.size % n == 0)
    sizes = {f.name: f.size for f in rule.factors}
    sizes[factor.name] //= parts
    return [tuple(math.prod(sizes[n] for n in dim) for dim in dims) for dims in values]


def _is_loop(eqn: Any, rule: Rule, factor: Factor, whole: str) -> bool:
    if _wrong_on_a_shard(eqn, rule, factor):
        return False
    shapes = _shapes_on_a_shard(rule.operands, rule, factor)
    return _program_text(eqn, shapes) == whole


def _wrong_on_a_shard(eqn: Any, rule: Rule, factor: Factor) -> str:
    """Why the primitive does not give a shard's results of a shard's operands."""
    wanted = _shapes_on_a_shard(rule.results, rule, factor)
    shapes = _shapes_on_a_shard(rule.operands, rule, factor)
    try:
        made = jax.eval_shape(_alone(eqn), *_arrays(eqn, shapes))
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    found = [tuple(x.shape) for x in jax.tree.leaves(made)]
    return "" if found == wanted else f"it gives {found} where {wanted} is wanted"


def _alone(eqn: Any) -> Any:
    return lambda *args: compat.bind(eqn, args, {})


def _arrays(eqn: Any, shapes: Sequence[tuple[int, ...]]) -> list[Any]:
    return [
        jax.ShapeDtypeStruct(shape, v.aval.dtype)
        for shape, v in zip(shapes, eqn.invars, strict=True)
    ]


_TENSOR = re.compile(r"tensor<(?:\d+x)*")


def _program_text(eqn: Any, shapes: Sequence[tuple[int, ...]]) -> str:
    """The op lowered for arrays of ``shapes``, without the sizes in its types."""
    traced = jax.jit(_alone(eqn), keep_unused=True).trace(*_arrays(eqn, shapes))
    text: str = traced.lower(lowering_platforms=("cpu",)).as_text()
    return _TENSOR.sub("tensor<", text)
