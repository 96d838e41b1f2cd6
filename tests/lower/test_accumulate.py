"""The step over microbatches is the undecorated step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.equality import STATE_TOLERANCE, worst_leaf
from benchmarks.models import build
from benchmarks.models.zoo import run_init
from rhino_jax.api.planned import Planned
from rhino_jax.errors import OptionsError
from rhino_jax.ir.mesh import Mesh
from rhino_jax.plan import make_plan
from rhino_jax.search.choose import plan_recipe
from rhino_jax.search.microbatch import Refusal, microbatched
from rhino_jax.search.subject import Subject
from rhino_jax.trace import trace
from rhino_jax.verify.hlo import read

Step = Callable[[Any, Any], Any]
DeviceMesh = Callable[[Mesh], Any]

DATA, PAIR = Mesh.of(data=8), Mesh.of(data=2, tensor=4)
PLANS = [
    ("data_parallel", DATA, 2),
    ("data_parallel", PAIR, 4),
    ("zero1", DATA, 4),
    ("zero3", DATA, 2),
    ("zero3", PAIR, 4),
    ("megatron", PAIR, 2),
    ("megatron", PAIR, 4),
]
BATCH, TOKENS, WIDTH, HIDDEN, VOCAB, LAYERS = 32, 4, 8, 16, 16, 2


def planned(
    step: Step,
    args: tuple[Any, Any],
    recipe: str,
    mesh: Mesh,
    microbatches: int,
    device_mesh: DeviceMesh,
    lowering: str = "manual",
) -> Planned:
    """``step`` by a recipe, cut in microbatches, on the devices of ``mesh``."""
    traced = trace(step, jax.eval_shape(lambda *args: args, *args), donate=False)
    subject = Subject(
        traced.program, traced.input_paths, traced.output_paths, traced.state_pairs
    )
    _, plain = plan_recipe(subject, mesh, recipe, {})
    found = microbatched(subject, plain, mesh, microbatches)
    assert not isinstance(found, Refusal), str(found)
    plan = make_plan(
        traced.program,
        found[0],
        mesh,
        traced.input_paths,
        traced.output_paths,
        recipe=recipe,
        lowering=lowering,
        microbatches=microbatches,
    )
    return Planned(plan, traced, device_mesh(mesh))


def run(plan: Planned, state: Any, batch: Any) -> Any:
    leaves = jax.tree.leaves(((state, batch), {}))
    flat = plan.jitted(*leaves, *plan.traced.constants)
    return jax.tree.unflatten(plan.traced.out_tree, flat)


def check_equal(plan: Planned, step: Step, state: Any, batch: Any, n: int = 2) -> None:
    """``n`` steps one after the other, state and all that is returned beside it."""
    state = jax.device_get(state)
    now, expected = state, state
    for _ in range(n):
        found = run(plan, now, batch)
        wanted = jax.jit(step)(expected, batch)
        error, path = worst_leaf(wanted, found)
        assert error <= STATE_TOLERANCE, f"{path}: {error}"
        now, expected = jax.device_get(found[0]), wanted[0]


# ---- steps with what real ones have -------------------------------------------------


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed + sum(shape)).standard_normal(shape) / 3


def tokens_batch() -> Any:
    rng = np.random.default_rng(3)
    shape = (BATCH, TOKENS)
    return {
        "tokens": rng.integers(0, VOCAB, shape, dtype=np.int32),
        "labels": rng.integers(0, VOCAB, shape, dtype=np.int32),
        "mask": (rng.random(shape) < 0.6).astype(np.float64),
    }


def parameters() -> Any:
    return {
        "embed": draw(VOCAB, WIDTH),
        "position": draw(TOKENS, WIDTH),
        "layers": {
            "up": draw(LAYERS, WIDTH, HIDDEN),
            "bias": draw(LAYERS, HIDDEN),
            "down": draw(LAYERS, HIDDEN, WIDTH),
        },
    }


def network(params: Any, batch: Any, key: jax.Array) -> jax.Array:
    """Logits: scanned, rematerialized layers with dropout; a tied, scaled head."""

    @jax.checkpoint
    def block(x: jax.Array, xs: Any) -> tuple[jax.Array, None]:
        layer, key = xs
        h = jnp.tanh(x @ layer["up"] + layer["bias"])
        kept = jax.random.bernoulli(key, 0.75, h.shape)
        return x + jnp.where(kept, h / 0.75, 0) @ layer["down"], None

    x = params["embed"][batch["tokens"]] + params["position"]
    keys = jax.random.split(key, LAYERS + 1)
    x = jnp.where(jax.random.bernoulli(keys[0], 0.9, x.shape), x, 0.0)
    x, _ = jax.lax.scan(block, x, (params["layers"], keys[1:]))
    return x @ params["embed"].T


def masked_loss(params: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, Any]:
    """Mean over the tokens that count, with z-loss and a regularizer."""
    logits = network(params, batch, key)
    logs = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(logs, batch["labels"][..., None], axis=-1)[..., 0]
    count = jnp.maximum(batch["mask"].sum(), 1.0)
    loss = -jnp.sum(picked * batch["mask"]) / count
    z = jnp.sum(jax.nn.logsumexp(logits, axis=-1) ** 2 * batch["mask"]) / count
    decay = sum(jnp.sum(p**2) for p in jax.tree.leaves(params))
    right = (logits.argmax(-1) == batch["labels"]) * batch["mask"]
    metrics = {
        "loss": loss,
        "accuracy": right.sum() / count,
        "largest": jnp.max(jnp.abs(logits)),
        "predictions": logits.argmax(-1),
        "scores": logits[:, -1, :].T,
    }
    return loss + 1e-3 * z + 1e-4 * decay, metrics


def clipped_adamw(key: Any) -> tuple[Step, Any]:
    optimizer = optax.chain(
        optax.clip_by_global_norm(0.1), optax.adamw(optax.cosine_decay_schedule(0.1, 9))
    )

    def step(state: Any, batch: Any) -> Any:
        key, use = jax.random.split(state["key"])
        (_, metrics), grads = jax.value_and_grad(masked_loss, has_aux=True)(
            state["params"], batch, use
        )
        updates, slots = optimizer.update(grads, state["slots"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        ema = jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, state["ema"], params)
        metrics["norm"] = optax.tree.norm(grads)
        new = {"params": params, "slots": slots, "ema": ema, "key": key}
        return new, metrics

    params = parameters()
    state = {
        "params": params,
        "slots": optimizer.init(params),
        "ema": params,
        "key": key,
    }
    return step, state


def scaled_adafactor(key: Any) -> tuple[Step, Any]:
    """A loss scale that halves where a gradient is not finite, and adafactor."""
    optimizer = optax.adafactor(0.01, min_dim_size_to_factor=4)

    def step(state: Any, batch: Any) -> Any:
        def loss_of(params: Any) -> tuple[jax.Array, Any]:
            loss, metrics = masked_loss(params, batch, key)
            return loss * state["scale"], metrics

        (_, metrics), grads = jax.value_and_grad(loss_of, has_aux=True)(state["params"])
        grads = jax.tree.map(lambda g: g / state["scale"], grads)
        finite = jnp.stack([jnp.isfinite(g).all() for g in jax.tree.leaves(grads)])
        good = finite.all()
        updates, slots = optimizer.update(grads, state["slots"], state["params"])
        params = optax.apply_updates(state["params"], updates)

        def kept(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)

        new = {
            "params": kept(params, state["params"]),
            "slots": kept(slots, state["slots"]),
            "scale": jnp.where(good, state["scale"], state["scale"] / 2),
        }
        return new, metrics

    params = parameters()
    state = {"params": params, "slots": optimizer.init(params), "scale": 1024.0}
    return step, state


@pytest.mark.parametrize(("recipe", "mesh", "microbatches"), PLANS)
def test_dropout_masks_clip_adamw_and_averages(
    recipe: str, mesh: Mesh, microbatches: int, device_mesh: DeviceMesh, x64: None
) -> None:
    step, state = clipped_adamw(jax.random.key(5))
    args = state, tokens_batch()
    check_equal(
        planned(step, args, recipe, mesh, microbatches, device_mesh), step, *args
    )


@pytest.mark.parametrize(("recipe", "mesh", "microbatches"), PLANS[1::2])
def test_adafactor_and_a_loss_scale(
    recipe: str, mesh: Mesh, microbatches: int, device_mesh: DeviceMesh, x64: None
) -> None:
    step, state = scaled_adafactor(jax.random.key(5))
    args = state, tokens_batch()
    check_equal(
        planned(step, args, recipe, mesh, microbatches, device_mesh), step, *args
    )


def test_on_one_device(device_mesh: DeviceMesh, x64: None) -> None:
    step, state = clipped_adamw(jax.random.key(5))
    args = state, tokens_batch()
    plan = planned(step, args, "data_parallel", Mesh(()), 8, device_mesh)
    check_equal(plan, step, *args)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "recipe", "mesh"),
    [
        ("gpt_scanned", "zero3", DATA),
        ("gpt_unrolled", "megatron", PAIR),
        ("t5", "zero1", DATA),
    ],
)
def test_the_zoo(
    name: str, recipe: str, mesh: Mesh, device_mesh: DeviceMesh, x64: None
) -> None:
    model = build(name, dtype="float64", optimizer=optax.sgd(1.0))
    step, state, batch = run_init(model)
    plan = planned(step, (state, batch), recipe, mesh, 2, device_mesh)
    check_equal(plan, step, state, batch, 1)


# ---- what the loop itself must get right --------------------------------------------


def momentum(loss: Callable[[Any, Any], Any]) -> Step:
    def step(params: Any, batch: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(params, batch)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), {"loss": value}

    return step


def looked_up(params: Any, batch: Any) -> jax.Array:
    """Labels picked by row numbers: the examples' own dimension is looked up."""
    logs = jax.nn.log_softmax(batch["x"] @ params["w"])
    picked = logs[jnp.arange(BATCH), batch["label"]]
    return -jnp.mean(picked * (batch["x"][:, 0] > 0))


def carried(params: Any, batch: Any) -> jax.Array:
    """A scan whose carries start as zeros: rows of examples, and a sum over them."""

    def body(carry: Any, w: jax.Array) -> Any:
        x, total, key = carry
        x = jnp.tanh((x + batch["x"]) @ w)
        return (x, total + jnp.sum(x**2), key + 1), jnp.mean(x)

    start = (jnp.zeros_like(batch["x"]), 0.0, 0)
    (x, total, key), means = jax.lax.scan(body, start, jnp.stack([params["w"]] * 3))
    return total / BATCH + jnp.mean(x) + jnp.sum(means) + 0.0 * key


def branched(params: Any, batch: Any) -> jax.Array:
    """A branch by a scalar, a loop of unknown length, both over examples."""
    x = batch["x"] @ params["w"]
    x = jax.lax.cond(params["w"][0, 0] > 0, jnp.sin, lambda x: x * 2.0, x)
    y = jax.lax.stop_gradient(x)
    y = jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] * 0.5), (0, y))
    return jnp.mean((x - y[1]) ** 2)


def ranged(params: Any, batch: Any) -> jax.Array:
    """The batch's own largest value, known before the loop, scales the examples."""
    x = batch["x"] / jnp.max(jnp.abs(batch["x"]))
    return jnp.mean((x @ params["w"]) ** 2)


@pytest.mark.parametrize("loss", [looked_up, carried, branched, ranged])
def test_idioms(
    loss: Callable[[Any, Any], Any], device_mesh: DeviceMesh, x64: None
) -> None:
    batch = {
        "x": draw(BATCH, WIDTH),
        "label": np.arange(BATCH, dtype=np.int32) % WIDTH,
    }
    args = {"w": draw(WIDTH, WIDTH)}, batch
    step = momentum(loss)
    for recipe, mesh, m in (("data_parallel", DATA, 4), ("megatron", PAIR, 2)):
        check_equal(planned(step, args, recipe, mesh, m, device_mesh), step, *args)


def test_the_same_bits_are_drawn(device_mesh: DeviceMesh) -> None:
    """Each turn draws its own rows of the bits that the whole step draws."""

    def step(state: Any, batch: Any) -> Any:
        bits = jax.random.bits(batch["key"], (BATCH, 3), jnp.uint32)
        total = jnp.sum(batch["x"] * (bits % 7).astype(jnp.float32))
        return state + total, bits ^ (batch["x"] > 0).astype(jnp.uint32)[:, :3]

    batch = {"x": draw(BATCH, 3).astype(np.float32), "key": jax.random.key(9)}
    args = np.float32(1.0), batch
    plan = planned(step, args, "data_parallel", DATA, 2, device_mesh)
    loop = plan.plan.assignment.loop
    assert loop is not None
    kinds = [plan.traced.program.ops[i].kind for i in loop.ops]
    assert "random_bits" in kinds
    found = run(plan, *args)
    np.testing.assert_array_equal(found[1], jax.jit(step)(*args)[1])


def test_keys_of_examples_leave_the_loop(device_mesh: DeviceMesh) -> None:
    """Typed keys are put together again as any rows are."""

    def step(state: Any, batch: Any) -> Any:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(batch["key"], batch["id"])
        return state + jnp.sum(batch["id"]), keys

    batch = {"id": np.arange(BATCH, dtype=np.int32), "key": jax.random.key(9)}
    args = np.int32(1), batch
    plan = planned(step, args, "data_parallel", DATA, 4, device_mesh)
    assert plan.plan.assignment.loop is not None
    kinds = {plan.traced.program.ops[i].kind for i in plan.plan.assignment.loop.ops}
    assert "random_fold_in" in kinds
    check_equal(plan, step, *args, 1)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_terms_are_added_up_in_float32(
    dtype: str, device_mesh: DeviceMesh
) -> None:
    """256 + 1 + 1 + ... is 256 where every sum is rounded to eight bits."""

    def step(state: Any, batch: Any) -> Any:
        return state + jnp.sum(batch, axis=0, dtype=dtype), {}

    scale = {"bfloat16": 256.0, "float16": 2048.0}[dtype]
    rows = np.ones((8, 4))
    rows[0] = scale
    args = np.zeros(4, dtype), rows.astype(dtype)
    plan = planned(step, args, "data_parallel", Mesh.of(data=1), 8, device_mesh)
    new, _ = run(plan, *args)
    np.testing.assert_array_equal(np.asarray(new, np.float32), scale + 8)


def test_collectives_are_compiled_as_planned(device_mesh: DeviceMesh) -> None:
    """Gradients cross the links once, after the loop; weights in every turn."""
    step, state = clipped_adamw(jax.random.key(5))
    state = jax.tree.map(
        lambda x: x.astype(np.float32) if isinstance(x, np.ndarray) else x, state
    )
    batch = jax.tree.map(
        lambda x: x.astype(np.float32) if x.dtype == np.float64 else x, tokens_batch()
    )
    leaves = jax.tree.leaves(((state, batch), {}))
    trips: dict[tuple[str, str], set[int]] = {}
    for recipe in ("data_parallel", "zero1", "zero3"):
        plan = planned(step, (state, batch), recipe, DATA, 4, device_mesh)
        text = plan.jitted.lower(*leaves, *plan.traced.constants).compile().as_text()
        compiled = read(text)
        for one in compiled:
            trips.setdefault((recipe, one.kind), set()).add(one.trip_count)
        sent = sum(one.total_wire_bytes for one in compiled)
        # One byte is what the CPU rounds a 4-byte scalar's share of 7/8 up by.
        if recipe != "zero3":  # the CPU merges the second gather of a weight
            assert abs(sent - plan.plan.wire_bytes) <= 0.01 * sent
    assert trips["data_parallel", "all-reduce"] == {1}
    assert trips["zero1", "reduce-scatter"] == {1}
    assert trips["zero3", "reduce-scatter"] == {1}
    assert max(trips["zero3", "all-gather"]) >= 4


def test_the_other_lowering_is_refused(device_mesh: DeviceMesh) -> None:
    args = {"w": draw(WIDTH, WIDTH)}, {"x": draw(BATCH, WIDTH)}
    step = momentum(ranged)
    plan = planned(step, args, "data_parallel", DATA, 2, device_mesh, "auto")
    with pytest.raises(OptionsError, match="drop lowering='auto'"):
        _ = plan.jitted
