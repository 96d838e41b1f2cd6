"""One small train step of each library: the Program gives what the step gives."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.training.train_state import TrainState

from tests.trace.harness import check_step, paired

RNG = np.random.default_rng(0)
BATCH = {
    "x": RNG.standard_normal((8, 4), np.float32),
    "y": RNG.standard_normal((8, 2), np.float32),
}


def assert_state_returns(traced: Any, *batch: str) -> None:
    """Every leaf but those of the batch is state, and succeeds itself."""
    pairs = paired(traced)
    assert {*traced.input_paths} - {*pairs} == {*batch}
    tails = {(i.partition("/")[2], o.partition("/")[2]) for i, o in pairs.items()}
    assert all(i == o for i, o in tails)


def test_plain_jax() -> None:
    def step(params: Any, batch: Any) -> Any:
        def loss_fn(p: Any) -> Any:
            hidden = jnp.tanh(batch["x"] @ p["w1"])
            return jnp.mean((hidden @ p["w2"] - batch["y"]) ** 2)

        loss, grads = jax.value_and_grad(loss_fn)(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), loss

    params = {"w1": jnp.full((4, 8), 0.1), "w2": jnp.full((8, 2), 0.2)}
    traced = check_step(step, (params, BATCH))
    assert traced.input_paths == ("params/w1", "params/w2", "batch/x", "batch/y")
    assert traced.output_paths == ("0/w1", "0/w2", "1")
    assert_state_returns(traced, "batch/x", "batch/y")


def test_flax_linen() -> None:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = nn.Dense(8)(x)
            x = nn.Dropout(0.2, deterministic=False)(nn.gelu(x))
            return nn.Dense(2)(nn.LayerNorm()(x))

    net = Net()
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    state = TrainState.create(
        apply_fn=net.apply,
        params=net.init(keys, BATCH["x"])["params"],
        tx=optax.adamw(1e-2),
    )

    def step(state: TrainState, batch: Any) -> Any:
        key = jax.random.fold_in(jax.random.key(2), state.step)

        def loss_fn(params: Any) -> Any:
            out = state.apply_fn({"params": params}, batch["x"], rngs={"dropout": key})
            return jnp.mean((out - batch["y"]) ** 2)

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        return state.apply_gradients(grads=grads), {"loss": loss}

    traced = check_step(step, (state, BATCH))
    # The step is a Python number: a weakly typed leaf, which pairs all the same.
    assert paired(traced)["state/step"] == "0/step"
    assert "state/params/Dense_0/kernel" in traced.input_paths
    assert "state/opt_state/0/mu/Dense_1/bias" in traced.input_paths
    assert_state_returns(traced, "batch/x", "batch/y")


class NnxNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(4, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)
        self.down = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.down(self.drop(nnx.relu(self.norm(self.up(x)))))


def nnx_loss(model: NnxNet, batch: Any) -> Any:
    return jnp.mean((model(batch["x"]) - batch["y"]) ** 2)


def nnx_setup() -> tuple[NnxNet, nnx.Optimizer]:
    model = NnxNet(nnx.Rngs(0))
    return model, nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)


def test_flax_nnx_split_and_merge() -> None:
    graph, state = nnx.split(nnx_setup())

    def step(state: Any, batch: Any) -> Any:
        model, optimizer = nnx.merge(graph, state)
        loss, grads = nnx.value_and_grad(nnx_loss)(model, batch)
        optimizer.update(model, grads)
        return nnx.state((model, optimizer)), loss

    traced = check_step(step, (state, BATCH))
    assert "state/0/up/kernel/value" in traced.input_paths
    assert_state_returns(traced, "batch/x", "batch/y")


def test_flax_nnx_modules_as_arguments() -> None:
    def step(model: NnxNet, optimizer: nnx.Optimizer, batch: Any) -> Any:
        loss, grads = nnx.value_and_grad(nnx_loss)(model, batch)
        optimizer.update(model, grads)
        return model, optimizer, loss

    traced = check_step(step, (*nnx_setup(), BATCH))
    assert "model/norm/mean/value" in traced.input_paths
    assert_state_returns(traced, "batch/x", "batch/y")


def test_flax_nnx_module_in_its_state_out() -> None:
    """The trees differ in kind, the paths of their leaves do not."""

    def step(model: NnxNet, batch: Any) -> Any:
        loss, grads = nnx.value_and_grad(nnx_loss)(model, batch)
        params = nnx.state(model, nnx.Param)
        nnx.update(model, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads))
        return nnx.state(model), loss

    traced = check_step(step, (nnx_setup()[0], BATCH))
    assert_state_returns(traced, "batch/x", "batch/y")


class EqxNet(eqx.Module):
    layers: list[eqx.nn.Linear]
    scale: jax.Array
    name: str = eqx.field(static=True)

    def __call__(self, x: Any) -> Any:
        return self.layers[1](jnp.tanh(self.layers[0](x))) * self.scale


def test_equinox() -> None:
    one, two = jax.random.split(jax.random.key(0))
    layers = [eqx.nn.Linear(4, 8, key=one), eqx.nn.Linear(8, 2, key=two)]
    model = EqxNet(layers, jnp.ones(2), "net")
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9))
    opt_state = tx.init(eqx.filter(model, eqx.is_array))

    def step(model: EqxNet, opt_state: Any, batch: Any) -> Any:
        @eqx.filter_value_and_grad
        def loss_fn(model: EqxNet) -> Any:
            return jnp.mean((jax.vmap(model)(batch["x"]) - batch["y"]) ** 2)

        loss, grads = loss_fn(model)
        updates, new = tx.update(grads, opt_state, model)
        return eqx.apply_updates(model, updates), new, loss

    traced = check_step(step, (model, opt_state, BATCH))
    assert traced.input_paths[0] == "model/layers/0/weight"
    assert_state_returns(traced, "batch/x", "batch/y")


def test_haiku() -> None:
    def forward(x: Any) -> Any:
        x = jax.nn.relu(hk.Linear(8, name="up")(x))
        x = hk.dropout(hk.next_rng_key(), 0.1, x)
        return hk.Linear(2, name="down")(x)

    net = hk.transform(forward)
    params = net.init(jax.random.key(0), BATCH["x"])
    tx = optax.adamw(1e-2)

    def step(params: Any, opt_state: Any, rng: Any, batch: Any) -> Any:
        def loss_fn(params: Any) -> Any:
            return jnp.mean((net.apply(params, rng, batch["x"]) - batch["y"]) ** 2)

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    args = (params, tx.init(params), jax.random.key(3), BATCH)
    traced = check_step(step, args)
    assert "params/up/w" in traced.input_paths
    assert_state_returns(traced, "rng", "batch/x", "batch/y")
