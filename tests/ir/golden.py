"""Three small steps whose Programs are kept as text under ``data``.

``python -m tests.ir.golden`` writes the files anew; look at the difference.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from rhino_jax.ir.program import Program
from rhino_jax.trace import trace

DATA = Path(__file__).parent / "data"


def shape(*dims: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, jnp.float32)


def mlp(state: Any, batch: Any) -> Any:
    def loss_fn(w: Any) -> Any:
        hidden = jnp.tanh(batch["x"] @ w["up"])
        return jnp.mean((hidden @ w["down"] - batch["y"]) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(state["w"])
    w = jax.tree.map(lambda p, g: p - 0.1 * g, state["w"], grads)
    return {"w": w, "step": state["step"] + 1}, loss


def layers(w: Any, x: Any) -> Any:
    @jax.checkpoint
    def layer(h: Any, w: Any) -> Any:
        return jnp.sin(h @ w), None

    def loss_fn(w: Any) -> Any:
        return lax.scan(layer, x, w)[0].sum()

    return w - jax.grad(loss_fn)(w)


def guarded(w: Any, x: Any) -> Any:
    loss, grad = jax.value_and_grad(lambda w: jnp.sum((x @ w) ** 2))(w)
    good = jnp.isfinite(loss)
    return lax.cond(good, lambda: w - 0.5 * grad, lambda: w), loss


STATE = {
    "w": {"up": shape(4, 8), "down": shape(8, 2)},
    "step": jax.ShapeDtypeStruct((), jnp.int32, weak_type=True),
}
STEPS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "mlp": (mlp, (STATE, {"x": shape(16, 4), "y": shape(16, 2)})),
    "layers": (layers, (shape(3, 8, 8), shape(2, 8))),
    "guarded": (guarded, (shape(4, 2), shape(16, 4))),
}


def program(name: str) -> Program:
    """The Program of one of the steps."""
    return trace(*STEPS[name]).program


if __name__ == "__main__":
    from rhino_jax.ir.printer import print_program

    for name in STEPS:
        text = print_program(program(name))
        (DATA / f"{name}.txt").write_text(f"{text}\n", "utf-8")
