"""How to teach Rhino an op of your own.

An FFI call or any primitive of another library runs whole unless there is a rule for
it: which loops its dimensions are, as in an einsum. A Pallas kernel is split along its
grid (:mod:`rhino_jax.rules.kernels`), and further by a rule and a local form.

>>> register_rule("my_matmul", "bij,jk->bik")
>>> registered()["my_matmul"].text
'bij,jk->bik'
>>> forget_rule("my_matmul")

One step alone may have rules of its own: ``auto_parallel(rules={"name": "ij->ij"})``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from rhino_jax.rules.stated import checked_notation


@dataclass(frozen=True)
class OpRule:
    """A rule as text, and how one shard is run (None: as the op stands).

    Raises:
        RuleError: the text is no rule; a caret shows where.
    """

    text: str
    local: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        checked_notation(self.text)


_TABLE: dict[str, OpRule] = {}
"""What users have registered in this process. It is read when a step is traced, and
what is read there travels on in the Program; nothing else looks at it."""


def register_rule(
    name: str, rule: str, local: Callable[..., Any] | None = None
) -> None:
    """Say which loops the dimensions of an op are made of.

    Args:
        name: of a JAX primitive, of a Pallas kernel (``pallas_call(name=...)``), of an
            FFI target, or of a jitted function, which then counts as one op.
        rule: the factors of every operand, then of every result: ``bij,jk->bik``. A
            dimension that is a product is written ``(ab)``. A factor of no result is
            summed over: a shard's result is then one term. What must stay whole is
            noted behind: ``ij->ij {j:blocked}``.
        local: the op on one shard, a function of its arrays as they lie there. Without
            it the op itself is run on them, which is right where no parameter holds a
            size; a Pallas kernel's grid does.

    Raises:
        RuleError: the text is no rule; a caret shows where.
    """
    _TABLE[name] = OpRule(rule, local)


def forget_rule(name: str) -> None:
    """Take back what :func:`register_rule` said of ``name``, if anything."""
    _TABLE.pop(name, None)


def as_rules(given: Mapping[str, OpRule | str]) -> dict[str, OpRule]:
    """Rules of one step, texts among them, checked as those that are registered.

    Raises:
        RuleError: a text is no rule; a caret shows where.
    """
    return {
        name: rule if isinstance(rule, OpRule) else OpRule(rule)
        for name, rule in given.items()
    }


def registered() -> Mapping[str, OpRule]:
    """The rules registered so far."""
    return MappingProxyType(dict(_TABLE))
