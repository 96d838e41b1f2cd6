"""Steps with attention recognized, decorated: equal, split every way, and chosen."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rhino_jax as rhino
from rhino_jax.api.attending import attended
from rhino_jax.api.planned import subject_of
from rhino_jax.api.planning import traced_bare
from rhino_jax.errors import OptionsError
from rhino_jax.ir.mesh import Mesh
from rhino_jax.options import make_options
from rhino_jax.plan import Plan, make_plan
from rhino_jax.rules.attention import BACKWARD, FORWARD
from rhino_jax.search.planner import Request, search
from rhino_jax.search.prices import AlphaBeta
from tests import attentions
from tests.attentions import (
    IN_GROUPS,
    WRITTEN,
    inputs_of,
    params_of,
    scanned_step,
    train_step,
)

MESH = {"x": 4, "y": 2}


def choices(program: Any, assignment: Any) -> dict[str, set[str]]:
    """By factor of attention ops, the axes that split it."""
    found: dict[str, set[str]] = {}

    def walk(program: Any, assignment: Any) -> None:
        for op, plan in zip(program.ops, assignment.ops, strict=True):
            if op.kind in (FORWARD, BACKWARD):
                for name, digits in plan.choice.splits:
                    axes = {split.axis for split in digits}
                    found[name] = found.get(name, set()) | axes
            for inner, body in zip(op.programs, plan.inner, strict=True):
                walk(inner, body)

    walk(program, assignment)
    return found


def assert_equal(got: Any, want: Any, rtol: float = 1e-12) -> None:
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    for a, b in pairs:
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * float(np.max(np.abs(b))))


def check(step: Any, args: Any, rtol: float = 1e-12, **options: Any) -> Any:
    """A decorated step beside the undecorated one; its plan."""
    fixed = {"attention": "recognized", "mesh": MESH, "donate": False, "cache_dir": ""}
    decorated = rhino.auto_parallel(step, **{**fixed, **options})
    assert_equal(decorated(*args), jax.jit(step)(*args), rtol)
    planned = decorated.planned(*args)
    assert planned.plan.attention == "recognized"
    return planned


def searched(step: Any, args: Any, **pins: Any) -> tuple[Plan, set[str]]:
    """A plan of a step with attention recognized, where no product may be done twice;
    the factors of attention that it splits."""
    traced = traced_bare(step, args, {}, make_options(donate=False))
    traced = attended(traced, "recognized").traced
    mesh = Mesh.of(**MESH)
    request = Request(mesh, AlphaBeta(), replicate_heavy=False, pins=pins)
    found = search(subject_of(traced), request).assignment
    paths = traced.input_paths, traced.output_paths
    plan = make_plan(traced.program, found, mesh, *paths, attention="recognized")
    split = choices(traced.program, found)
    assert set.union(*split.values()) == set(MESH)
    return plan, set(split)


SPLITS = {
    "examples": (8, 1, {"b"}, (("x", "y"),)),
    "heads": (1, 8, {"h"}, ()),
    "a ring": (1, 1, {"s"}, ((), ("x", "y"))),
    "a ring, and heads": (1, 2, {"s", "h"}, ((), ("x",))),
    "a ring, and examples": (2, 1, {"s", "b"}, (("y",), ("x",))),
}
"""Examples, heads, what is split for there is nothing else, how inputs are pinned."""


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *(("by hand", how) for how in SPLITS),
        ("mask added", "a ring"),
        ("linen", "a ring"),
    ],
)
def test_split_every_way_it_is_the_undecorated_step(
    name: str, how: str, x64: None
) -> None:
    batch, heads, factors, pin = SPLITS[how]
    step = partial(train_step, WRITTEN[name])
    args = params_of(heads, heads), inputs_of(batch, 32)
    plan, split = searched(step, args, x=pin)
    assert split == factors
    decorated = rhino.auto_parallel(step, plan=plan, mesh=MESH, donate=False)
    assert_equal(decorated(*args), jax.jit(step)(*args))


@pytest.mark.parametrize("name", ["grouped", "window", "all seen"])
def test_other_masks_and_heads(name: str, x64: None) -> None:
    attend = {**WRITTEN, **IN_GROUPS}[name]
    args = params_of(8, 2 if name == "grouped" else 8), inputs_of(4, 32)
    check(partial(train_step, attend), args)


def test_what_jax_has_its_softmax_in_float32(x64: None) -> None:
    args = params_of(), inputs_of()
    check(partial(train_step, WRITTEN["jax"]), args, rtol=1e-5)


@pytest.mark.parametrize("remat", [False, True])
def test_layers_in_a_scan(remat: bool, x64: None) -> None:
    """Around a ring; without remat the reverse loop is handed the result and sums."""
    step = partial(scanned_step, attentions.by_hand, remat)
    args = params_of(1, 1, layers=3), inputs_of(1, 32)
    plan, split = searched(step, args)
    assert split == {"s"}
    decorated = rhino.auto_parallel(step, plan=plan, mesh=MESH, donate=False)
    assert_equal(decorated(*args), jax.jit(step)(*args))


def test_in_microbatches_with_layers_recomputed(x64: None) -> None:
    step = partial(scanned_step, attentions.by_hand, False)
    args = params_of(layers=3), inputs_of(16)
    planned = check(step, args, microbatches=2, remat="boundary")
    assert (planned.plan.microbatches, bool(planned.plan.remat)) == (2, True)


def test_a_saved_plan_says_it(tmp_path: Path, x64: None) -> None:
    step, args = partial(train_step, attentions.by_hand), (params_of(), inputs_of())
    planned = check(step, args)
    assert "attention recognized" in str(planned)
    file = tmp_path / "plan.json"
    planned.save(file)
    assert Plan.from_json(file.read_text()) == planned.plan
    loaded = rhino.auto_parallel(step, plan=str(file), mesh=MESH, donate=False)
    assert_equal(loaded(*args), jax.jit(step)(*args))
    kept = {"attention": "recognized", "mesh": MESH, "cache_dir": str(tmp_path)}
    for _ in range(2):  # planned, then found in the cache
        cached = rhino.auto_parallel(step, donate=False, **kept)
        assert_equal(cached(*args), jax.jit(step)(*args))
        assert cached.planned(*args).plan == planned.plan


def test_with_a_recipe(x64: None) -> None:
    step, args = partial(train_step, attentions.by_hand), (params_of(), inputs_of(8))
    check(step, args, recipe="zero3 x megatron")


def test_what_is_asked_for_and_is_not_there() -> None:
    step = partial(train_step, attentions.entropy)
    options = {"cluster": "h100:1x8", "cache_dir": "", "attention": "recognized"}
    plan = rhino.plan(step, params_of(), inputs_of(), **options).plan
    assert plan.attention == ""
    assert any("attention recognized: 0 of 1" in note for note in plan.notes)
    with pytest.raises(OptionsError, match="did you mean 'recognized'"):
        rhino.plan(step, params_of(), inputs_of(), attention="recognised")


# ---- chosen ------------------------------------------------------------------------


def long_step(layers: int, params: Any, x: Any) -> Any:
    """Layers that stand one by one, in bfloat16."""

    def loss_of(params: Any) -> Any:
        y = x
        for p in params:
            y = attentions.layer(attentions.by_hand, y, p)
        return jnp.mean(y.astype(jnp.float32) ** 2)

    loss, grads = jax.value_and_grad(loss_of)(params)
    return jax.tree.map(lambda p, g: p - g, params, grads), loss


def long_plan(length: int, cluster: str, batch: int = 1, **options: Any) -> Plan:
    """Of 4 layers, 16 heads of 128."""
    shape = partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    layer = {name: shape((2048, 16, 128)) for name in "qkv"}
    params = [{**layer, "o": shape((16, 128, 2048))}] * 4
    step = partial(long_step, 4)
    args = params, shape((batch, length, 2048))
    found = rhino.plan(step, *args, cluster=cluster, cache_dir="", **options)
    return found.plan


@pytest.mark.parametrize(
    ("length", "why"),
    [(65536, "as written a step would take"), (262144, "one array of scores takes")],
)
def test_a_long_sequence_is_planned_without_scores(length: int, why: str) -> None:
    plan = long_plan(length, "h100:1x8")
    assert plan.attention == "recognized"
    assert any("recognized: 4 of 4" in note for note in plan.notes)
    assert any(why in note for note in plan.notes)
    assert plan.predicted is not None
    assert plan.predicted.peak_bytes <= plan.predicted.limit_bytes


def test_a_short_sequence_is_planned_as_written() -> None:
    plan = long_plan(1024, "h100:1x8", batch=64)
    assert (plan.attention, plan.notes) == ("", ())
