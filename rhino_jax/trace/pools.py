"""The gradient of average pooling, read as one op.

JAX writes it as a ``pad`` with zeros between the elements, and a sum over windows of
what that makes. The padded array has blocks of no equal size, so nobody could split it;
as one sum over windows whose elements stand apart it is like any other pooling.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rhino_jax import compat

SUM = "reduce_window_sum"


def without_pads(jaxpr: Any) -> list[Any]:
    """The equations of ``jaxpr``, pads that only a sum over windows reads made part of
    it."""
    made = {eqn.outvars[0]: eqn for eqn in jaxpr.eqns if eqn.primitive.name == "pad"}
    if not made:
        return list(jaxpr.eqns)
    reads = Counter(
        var
        for held in (*(eqn.invars for eqn in jaxpr.eqns), jaxpr.outvars)
        for var in held
        if not isinstance(var, compat.Literal)
    )
    found, gone = [], set()
    for eqn in jaxpr.eqns:
        pad = made.get(eqn.invars[0]) if eqn.primitive.name == SUM else None
        if pad is not None and reads[eqn.invars[0]] == 1 and _joins(eqn, pad):
            gone.add(id(pad))
            eqn = _joined(eqn, pad)
        found.append(eqn)
    return [eqn for eqn in found if id(eqn) not in gone]


def _joins(eqn: Any, pad: Any) -> bool:
    """Whether zeros are padded, and the sum has neither padding nor gaps of its own."""
    number = pad.invars[1]
    zero = isinstance(number, compat.Literal) and number.val == 0
    plain = not any(map(any, eqn.params["padding"]))
    apart = any(n != 1 for n in eqn.params["base_dilation"])
    cut = any(low < 0 or high < 0 for low, high, _ in pad.params["padding_config"])
    return zero and plain and not apart and not cut


def _joined(eqn: Any, pad: Any) -> Any:
    config: Sequence[tuple[int, int, int]] = pad.params["padding_config"]
    params = {
        **eqn.params,
        "padding": tuple((int(low), int(high)) for low, high, _ in config),
        "base_dilation": tuple(int(inner) + 1 for _, _, inner in config),
    }
    return eqn.replace(invars=[pad.invars[0]], params=params)
