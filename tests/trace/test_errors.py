"""What is wrong with a step, in the user's terms and all at once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback

from rhino_jax.errors import TraceError
from rhino_jax.trace import trace

X = np.ones((4, 3), np.float32)


def message(fun: Any, *args: Any, static: tuple[int, ...] = (), **kwargs: Any) -> str:
    with pytest.raises(TraceError) as caught:
        trace(fun, args, kwargs, static_argnums=static)
    error = caught.value
    # No frame of JAX is shown: neither as cause nor in the traceback.
    assert error.__cause__ is None
    assert error.__context__ is None or error.__suppress_context__
    shown = error.__traceback__
    while shown is not None:
        assert "/jax/" not in shown.tb_frame.f_code.co_filename
        shown = shown.tb_next
    return str(error)


def decide(x: Any, scale: Any) -> Any:
    if x[0, 0] > scale:
        return x
    return scale * x


def count(x: Any) -> Any:
    return [k * x for k in range(x[0, 0].astype(int))]


def to_float(x: Any) -> Any:
    return float(x.sum())


def to_numpy(x: Any) -> Any:
    return np.sin(x)


def masked(x: Any) -> Any:
    return x[x > 0]


def shaped(x: Any, n: Any) -> Any:
    return x.reshape(n)


CONCRETE: list[tuple[Callable[..., Any], tuple[Any, ...], str, str]] = [
    (decide, (X, 2.0), "`if x[0, 0] > scale:`", "jax.lax.cond"),
    (count, (X,), "`return [k * x for k in range(", "jax.lax.fori_loop"),
    (to_float, (X,), "`return float(x.sum())`", "outside the step"),
    (to_numpy, (X,), "`return np.sin(x)`", "Use jax.numpy"),
    (masked, (X,), "`return x[x > 0]`", "jnp.where(mask, x, fill)"),
    (shaped, (X, 12), "`return x.reshape(n)`", "static_argnums"),
]


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["plain", "jitted"])
@pytest.mark.parametrize(
    ("fun", "args", "line", "step"),
    CONCRETE,
    ids=[case[0].__name__ for case in CONCRETE],
)
def test_values_that_are_not_known_while_tracing(
    fun: Any, args: Any, line: str, step: str, wrap: Any
) -> None:
    number = fun.__code__.co_firstlineno + 1
    text = message(wrap(fun), *args)
    assert text.startswith(f"{fun.__name__}: {__file__}:{number}: {line}")
    assert step in text


def test_the_argument_is_named() -> None:
    assert "depends on the argument x and scale." in message(decide, X, 2.0)
    assert "depends on the argument n." in message(shaped, X, 12)


def test_the_users_line_is_the_innermost_of_their_own() -> None:
    """Not the library's line that it called."""

    def step(x: Any) -> Any:
        return jnp.mean(jax.vmap(lambda row: to_float(row))(x))

    assert "`return float(x.sum())`" in message(step, X)


class MineError(TypeError):
    """An error of the user's own."""


def test_what_the_step_raises_itself_passes_through() -> None:
    mine = MineError("broken, and no valid JAX type")

    def step(x: Any) -> Any:
        raise mine

    for fun in (step, jax.jit(step)):
        with pytest.raises(MineError) as caught:
            trace(fun, (X,))
        assert caught.value is mine
    with pytest.raises(TypeError, match="dot_general requires contracting"):
        trace(lambda x: jnp.dot(x, x), (X,))


def test_errors_that_the_step_catches_are_its_own_affair() -> None:
    def step(x: Any) -> Any:
        try:
            return to_float(x)
        except jax.errors.ConcretizationTypeError:
            return x.sum()

    assert trace(step, (X,)).output_paths == ("result",)


def test_results_that_are_no_arrays_all_at_once() -> None:
    def step(x: Any) -> Any:
        return x, {"name": "loss", "fun": len, "fine": None, "ok": [1, x.sum()]}

    for fun in (step, jax.jit(step)):
        text = message(fun, X)
        assert text.splitlines()[:3] == [
            "step returns 2 results that JAX does not have:",
            "  - 1/fun: a function <built-in function len> is no array",
            "  - 1/name: str 'loss' is no array",
        ]
    assert "  - the result: str 'x' is no array" in message(lambda x: "x", X)
    assert "  - 0: object <object" in message(lambda x: (object(), x), X)


def test_arguments_that_are_no_arrays_all_at_once() -> None:
    def step(state: Any, batch: Any, mode: Any) -> Any:
        return state

    batch = {"x": X, "name": "a", "when": np.array(["2020"], "datetime64[Y]")}
    text = message(step, {"f": jnp.tanh, "w": X}, batch, "train")
    assert text.splitlines()[0] == "step: 4 arguments are not usable:"
    assert [line.partition(": ")[0] for line in text.splitlines()[1:5]] == [
        "  - state/f",
        "  - batch/name",
        "  - batch/when",
        "  - mode",
    ]
    assert "datetime64[Y], which JAX does not have" in text
    assert "static_argnums" in text
    # Jitted: a whole argument may be static, a part of a tree with arrays can not.
    jitted = jax.jit(step, static_argnames="mode")
    text = message(jitted, X, batch, "train")
    assert "batch/name" in text and "mode" not in text
    assert "batch" in message(jitted, X, {"name": "a"}, "train")


def test_keys_that_do_not_sort() -> None:
    text = message(lambda state: state, {"a": X, 1: X})
    assert "state: Comparator raised exception while sorting" in text
    assert "'<' not supported between" in text
    assert "the result" in message(lambda x: {"a": x, 1: x}, X)


def test_static_arguments_that_do_not_hash_or_exist() -> None:
    def step(x: Any, sizes: Any, names: Any) -> Any:
        return x

    text = message(step, X, [1], {"a"}, static=(1, 2))
    assert "  - sizes: static, but a list does not hash" in text
    assert "  - names: static, but a set does not hash" in text
    assert "static_argnums [7]: step takes 3 positional" in message(
        step, X, 1, 2, static=(7,)
    )
    jitted = jax.jit(step, static_argnums=1)
    assert "Non-hashable static arguments" in message(jitted, X, [1], X)


def test_calls_that_do_not_fit() -> None:
    def step(state: Any, batch: Any) -> Any:
        return state

    assert "missing a required argument: 'batch'" in message(step, X)
    assert "unexpected keyword argument 'mode'" in message(step, X, X, mode=1)
    assert "too many positional" in message(jax.jit(step), X, X, X)
    assert message(3, X) == "A step must be a function; 3 is int."


def test_arrays_of_another_trace() -> None:
    kept: list[Any] = []

    def keeps(x: Any) -> Any:
        jax.lax.scan(lambda c, _: (c + 1, kept.append(c)), x, length=2)
        return x

    def uses(x: Any) -> Any:
        return jnp.sin(x) + kept[0]

    trace(keeps, (X,))
    text = message(uses, X)
    assert f"{__file__}:{uses.__code__.co_firstlineno + 1}: `return jnp.sin" in text
    assert "Return it from that function" in text
    assert "is used outside" in message(lambda x: kept[0], X)

    def within(x: Any) -> Any:
        kept.clear()
        return keeps(x) * kept[0]

    assert "is used outside" in message(within, X)
    with jax.checking_leaks():
        assert "is used outside" in message(keeps, X)


def test_side_effects_in_order() -> None:
    def step(x: Any) -> Any:
        jax.debug.print("{}", x.sum(), ordered=True)
        io_callback(print, None, x, ordered=True)
        return jax.lax.scan(lambda c, _: (inner(c), None), x, length=2)[0]

    def inner(c: Any) -> Any:
        jax.debug.print("{}", c, ordered=True)
        return c

    text = message(step, X)
    first = step.__code__.co_firstlineno
    places = [line.split(": ")[0] for line in text.splitlines() if "  - " in line]
    wanted = [first + 1, first + 2, inner.__code__.co_firstlineno + 1]
    assert sorted({int(p.rpartition(":")[2]) for p in places}) == wanted
    assert "ordered=True" in text
    assert "mutable jax.Ref" in message(lambda r: r[...], jax.new_ref(jnp.ones(2)))
    # Without an order there is nothing to keep.
    trace(lambda x: (jax.debug.print("{}", x), x)[1], (X,))


def test_references_made_inside_become_values() -> None:
    def step(x: Any) -> Any:
        held = jax.new_ref(x)
        held[0, 0] = 1.0
        return held[...]

    found = trace(step, (X,))
    kinds = [op.kind for op in found.program.ops]
    assert "dynamic_update_slice" in kinds and not {"new_ref", "swap", "get"} & set(
        kinds
    )


def test_transformations_that_compile_on_their_own() -> None:
    def step(x: Any) -> Any:
        return x

    text = message(eqx.filter_jit(step), X)
    assert text.startswith("step is compiled by equinox.filter_jit already.")
    assert "equinox.partition(model, equinox.is_array)" in text
    model = eqx.nn.MLP(2, 2, 4, 1, key=jax.random.key(0))
    assert "model/activation" in message(lambda model: model, model)


def test_what_a_user_sees_has_no_line_of_jax(tmp_path: Any) -> None:
    file = tmp_path / "train.py"
    file.write_text(
        "import jax.numpy as jnp\nfrom rhino_jax.trace import trace\n\n\n"
        "def step(x):\n    if x.sum() > 0:\n        return x\n\n\n"
        "trace(step, (jnp.ones(3),))\n"
    )
    done = subprocess.run(
        [sys.executable, str(file)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 1
    assert "TraceError: step: " in done.stderr
    assert f"{file}:6: `if x.sum() > 0:`" in done.stderr
    assert "/jax/_src/" not in done.stderr
