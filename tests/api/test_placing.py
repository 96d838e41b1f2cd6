"""Who owns which buffer, and where it lies: donation, moves, aliases, placing."""

from __future__ import annotations

import gc
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import rhino_jax as rhino
from rhino_jax.errors import DonationError, SignatureError

X = np.ones((16, 4), np.float32)
HERE = __file__


def step_fun(state: Any, x: Any) -> Any:
    def loss_of(w: Any) -> Any:
        return jnp.mean((x @ w["a"] @ w["b"]) ** 2)

    loss, grads = jax.value_and_grad(loss_of)(state["w"])
    w = jax.tree.map(lambda p, g: p - 0.1 * g, state["w"], grads)
    mean = jax.tree.map(lambda m, p: 0.9 * m + 0.1 * p, state["mean"], w)
    return {"w": w, "mean": mean}, loss


def state() -> Any:
    w = {"a": np.full((4, 16), 0.1, np.float32), "b": np.ones((16, 8), np.float32)}
    return {"w": w, "mean": w}


def line(text: str) -> int:
    """The number of the line of this file that starts so."""
    lines = Path(HERE).read_text().splitlines()
    return 1 + next(i for i, t in enumerate(lines) if t.strip().startswith(text))


def agree(found: Any, steps: int = 1) -> None:
    expected = state()
    for _ in range(steps):
        expected, _ = jax.jit(step_fun)(expected, X)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), expected, found
    )


def make(**options: Any) -> Any:
    return rhino.auto_parallel(**{"recipe": "zero3", **options})(step_fun)


def one(number: int) -> Any:
    return jax.devices()[number]


def test_the_old_state_is_given_away_unless_it_is_kept() -> None:
    step = make()
    old = step.place(state(), X)
    new, _ = step(old, step.shard_batch(X))
    assert all(x.is_deleted() for x in jax.tree.leaves(old))
    agree(new)
    keeping = make(donate=False)
    old = keeping.place(state(), X)
    keeping(old, X)
    agree(keeping(old, X)[0])


def test_a_jitted_step_says_itself_what_is_donated() -> None:
    def plain(w: Any, x: Any) -> Any:
        return w - x.sum(), w.sum()

    for names, gone in ((None, (True, False)), ("x", (False, True))):
        step = rhino.auto_parallel(jax.jit(plain, donate_argnames=names))
        w = step.place(np.ones((16, 4), np.float32), X)
        x = step.shard_batch(X)
        step(w, x)
        assert (w.is_deleted(), x.is_deleted()) == gone


def test_the_call_that_gave_it_away_is_named() -> None:
    step = make()
    first = step.place(state(), X)
    second, _ = step(first, X)  # the first goes here
    third, _ = step(second, X)  # the second goes here
    for old, where in ((first, "second, _ ="), (second, "third, _ =")):
        with pytest.raises(DonationError) as caught:
            step(old, X)
        text = str(caught.value)
        assert f"state/mean/a: given away in the call at {HERE}:{line(where)}" in text
        assert "and 1 more" in text and "donate=False" in text
    # One leaf of many, and in the place of another argument.
    mixed = {"w": {**third["w"], "b": first["w"]["b"]}, "mean": third["mean"]}
    with pytest.raises(DonationError, match="state/w/b: given away"):
        step(mixed, X)
    x = step.shard_batch(X)
    x.delete()
    with pytest.raises(DonationError, match="x: given away"):
        step(third, x)
    agree(step(third, X)[0], 3)


def test_deleted_before_it_was_ever_passed() -> None:
    w = jax.device_put(state())
    w["w"]["a"].delete()
    with pytest.raises(DonationError, match="state/w/a: deleted elsewhere"):
        make()(w, X)


@pytest.mark.parametrize("kind", ["numpy", "uncommitted", "placed", "elsewhere"])
def test_an_average_that_starts_as_the_parameters(kind: str) -> None:
    """One array twice in the state: its buffer can be given away once only."""
    step = make()
    held = state()
    if kind == "uncommitted":
        held = jax.tree.map(jnp.asarray, held)
    if kind == "placed":
        step.planned(held, X)
        held = step.place(held)
    if kind == "elsewhere":
        held = jax.device_put(held, one(3))
    twice = {"w": held["w"], "mean": held["w"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        new, _ = step(twice, X)
        new, _ = step({"w": new["w"], "mean": new["w"]}, X)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(new))
    agree(new["w"] and make(donate=False)(state(), X)[0])


def test_a_view_of_a_parameter_is_that_parameter() -> None:
    """Two arrays with one buffer, as ``device_put`` makes them."""
    w = jax.tree.map(jnp.asarray, state()["w"])
    same = jax.device_put(w, one(0))
    with pytest.warns(UserWarning, match="moved"):
        new, _ = make()({"w": w, "mean": same}, X)
    agree(new)


def test_the_batch_may_be_a_part_of_the_state() -> None:
    step = rhino.auto_parallel(lambda w, x: (w - 0.1 * x, (w * x).sum()))
    w = step.place(X, X)
    for _ in range(2):
        new, total = step(w, w)
        assert float(total) == 64
        np.testing.assert_allclose(new, 0.9 * X)
        w = step.place(X)


def test_a_returned_state_changed_in_place() -> None:
    """It is the very dictionary that was returned, and holds one array twice."""
    step = make()
    new, _ = step(step.place(state(), X), X)
    for _ in range(2):
        new["mean"] = new["w"]
        new, _ = step(new, X)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(new))
    new["w"] = {"a": new["w"]["a"][:, :8], "b": new["w"]["b"][:8]}
    new["mean"] = jax.tree.map(jnp.copy, new["w"])
    with pytest.warns(UserWarning, match="moved"):
        smaller, _ = step(new, X)  # other shapes: planned for them
    assert smaller["w"]["a"].shape == (4, 8)


def test_a_returned_state_deleted_since() -> None:
    step = make()
    new, _ = step(step.place(state(), X), X)
    new["w"]["a"].delete()
    with pytest.raises(DonationError, match="state/w/a"):
        step(new, X)


def test_an_error_of_a_run_is_not_hidden_by_what_it_took() -> None:
    """Buffers are gone once a call has begun: its own error is told, not that."""
    step = make()
    new, _ = step(step.place(state(), X), X)
    (entry,) = step._ready
    run = entry.run

    def broken(*call: Any) -> Any:
        run(*call)
        raise RuntimeError("the network went down")

    entry.run = broken
    with pytest.raises(RuntimeError, match="went down"):
        step(new, X)


def test_parts_of_the_state_as_arguments_of_their_own() -> None:
    """Positions and keywords; the second state is the first one's result, in parts."""

    def steps(w: Any, x: Any, *, mean: Any) -> Any:
        out, loss = step_fun({"w": w, "mean": mean}, x)
        return loss, out["w"], out["mean"]

    step = rhino.auto_parallel(recipe="zero3")(steps)
    held = state()
    w, mean = held["w"], held["mean"]
    for _ in range(3):
        _, w, mean = step(w, X, mean=mean)
    agree({"w": w, "mean": mean}, 3)


def test_a_state_donated_in_part() -> None:
    """What no result takes the place of stays; the rest of that argument goes."""

    def steps(held: Any, x: Any) -> Any:
        out, loss = step_fun(held["train"], x * held["scale"])
        return {"train": out, "loss": loss}

    step = rhino.auto_parallel(recipe="zero3")(steps)
    scale, train = jnp.ones(()), state()
    for _ in range(3):
        train = step({"train": train, "scale": scale}, X)["train"]
    agree(train, 3)
    assert not scale.is_deleted()


ELSEWHERE = {
    "another device": lambda: one(5),
    "another mesh": lambda: NamedSharding(
        Mesh(np.array(jax.devices()), ("other",), axis_types=(AxisType.Auto,)), P()
    ),
    "some of the devices": lambda: NamedSharding(
        Mesh(np.array(jax.devices()[2:4]), ("d",), axis_types=(AxisType.Auto,)), P()
    ),
}


@pytest.mark.parametrize("place", ELSEWHERE)
def test_what_lies_elsewhere_is_moved_with_one_notice(place: str) -> None:
    """At the first call or later; what was given is not deleted."""
    where = ELSEWHERE[place]()
    step = make()
    now = step.place(state(), X)
    now, _ = step(now, X)
    far = jax.device_put(state(), where)
    batch = jax.device_put(X, where)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        agree(step(far, X)[0])
        agree(step(far, batch)[0])
        now, _ = step(now, batch)
        step(now, X)
    texts = [str(w.message) for w in seen if "moved" in str(w.message)]
    assert len(texts) == 1
    assert seen[0].filename == HERE
    assert "step_fun: arguments lay elsewhere and were moved" in texts[0]
    assert "state/mean/a on " in texts[0] and "planned 8 devices as P(" in texts[0]
    assert "and 1 more" in texts[0] and "step_fun.place(state)" in texts[0]
    agree(far, 0)


def test_one_leaf_elsewhere_in_a_state_of_many() -> None:
    """Not one of the few whose sharding is looked at."""
    step = rhino.auto_parallel(
        lambda ws, x: ([w + x.mean() for w in ws], x.sum()), recipe="zero3"
    )
    ws = step.place([np.ones(64, np.float32)] * 40, X)
    ws, _ = step(ws, X)
    ws[7] = jax.device_put(ws[7], NamedSharding(ws[7].sharding.mesh, P("data")))
    with pytest.warns(UserWarning, match="ws/7 on 8 devices"):
        ws, _ = step(ws, X)
    np.testing.assert_allclose(ws[7], 3.0)


def test_place_copies_what_it_moves() -> None:
    step = make()
    mine = jax.tree.map(jnp.asarray, state())
    placed = step.place(mine, X)
    step(placed, X)
    agree(mine, 0)
    again = step.place(step.place(mine))
    assert jax.tree.leaves(again)[0].sharding.spec == P(None, "data")
    with pytest.raises(SignatureError, match="nothing is planned yet") as caught:
        make().place(state())
    assert "step_fun.place(state, batch)" in str(caught.value)


def test_batches_are_laid_as_the_plan_of_their_shape() -> None:
    step = make()
    step.planned(state(), X)
    assert step.shard_batch(X).sharding.spec == P("data")
    with pytest.raises(SignatureError) as caught:
        step.shard_batch(X[:3])
    text = str(caught.value)
    assert "x of shape (16, 4), given (3, 4)" in text
    assert "step_fun.planned(state, batch)" in text
    step.planned(state(), X[:3])
    assert step.shard_batch(X[:3]).sharding.spec == P()
    assert step.shard_batch(X).sharding.spec == P("data")
    with pytest.raises(SignatureError, match="no argument of step_fun is like this"):
        step.shard_batch({"x": X})


def test_init_makes_the_state_in_its_layout() -> None:
    def init(rng: Any, x: Any, scale: float = 1.0) -> Any:
        w = {"a": jax.random.normal(rng, (4, 16)), "b": scale * jnp.ones((16, 8))}
        return {"w": w, "mean": jax.tree.map(jnp.zeros_like, w)}

    step = make()
    made = step.init(init, jax.random.key(0), X)
    assert made["w"]["a"].sharding.spec == P(None, "data")
    assert step(made, X)[0]["w"]["a"].sharding.spec == P(None, "data")
    with pytest.raises(SignatureError, match=r"init_fn takes \(a, b, c\)"):
        step.init(lambda a, b, c: a, jax.random.key(0), X)


def test_following_another_step() -> None:
    step = make()

    def evaluate(w: Any, x: Any) -> Any:
        return jnp.mean(x @ w["a"] @ w["b"])

    followed = rhino.follow(step, evaluate)
    with pytest.raises(SignatureError, match="step_fun is not planned yet"):
        followed(state()["w"], X)
    with pytest.raises(rhino.RhinoError, match="decorated with rhino"):
        rhino.follow(step_fun, evaluate)
    now = step.place(state(), X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing has to move
        for _ in range(3):
            value = followed(now["w"], X)
            np.testing.assert_allclose(value, evaluate(now["w"], X), rtol=1e-5)
            old, (now, _) = now, step(now, X)
    with pytest.raises(DonationError, match="w/a: deleted elsewhere"):
        followed(old["w"], X)


def test_nothing_keeps_a_state_alive() -> None:
    step = make()
    now = step.place(state(), X)
    for _ in range(3):
        now, _ = step(now, X)
    del now
    gc.collect()
    before = sum(x.nbytes for x in jax.live_arrays())
    assert before < 10_000_000
    held = [x for x in jax.live_arrays() if x.shape in ((4, 16), (16, 8))]
    assert held == []
