"""The zoo: shapes that tell the truth, steps that learn, large sizes that trace."""

import math
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.extend as jex
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.models import (
    FIRST,
    NAMES,
    ZOO,
    build,
    decode,
    llama,
    lora,
    materialize,
    recurrence,
)
from benchmarks.models.moe import top2_gating
from benchmarks.models.resnet import shallow
from benchmarks.models.swin import from_windows, region_mask, to_windows
from benchmarks.models.t5 import relative_buckets
from benchmarks.models.zoo import Model

# Parameters of the large models, in millions, with no depth given.
LARGE_PARAMS_MILLIONS = {
    "gpt_unrolled": (1300, 1450),
    "gpt_scanned": (1250, 1350),
    "vit": (300, 310),
    "resnet": (25, 26),
    "moe": (1250, 1400),
    "t5": (730, 800),
    "recommender": (3500, 4500),
    "bert": (335, 340),
    "clip": (425, 430),
    "unet": (30, 32),
    "wide_resnet": (68, 70),
    "vgg": (143, 144),
    "swin": (195, 198),
    "recurrence": (1250, 1450),
    "lstm": (1700, 1900),
    "graph": (2, 3),
    "lora": (6700, 6800),
    "decode": (68000, 70000),
    "pinn": (1, 3),
}

FROZEN, TRAINED = ("lora", "decode"), ("adapters", "opt_state")

per_model = pytest.mark.parametrize("name", NAMES)
# The others' steps are run by test_equality and benchmarks.equality.
per_first_model = pytest.mark.parametrize("name", FIRST)


def signature(tree: Any) -> tuple[Any, list[tuple[tuple[int, ...], str]]]:
    """Structure of a tree, with the shape and dtype of each leaf."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(leaf.shape, str(leaf.dtype)) for leaf in leaves]


def trace(model: Model) -> Any:
    """The jaxpr of a model's step, from shapes alone."""
    traced = jax.jit(model.train_step).trace(model.state_shapes, model.batch_shapes)
    return traced.jaxpr.jaxpr


def equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation of a jaxpr, those of nested jaxprs included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jex.core.jaxprs_in_params(equation.params):
            yield from equations(getattr(inner, "jaxpr", inner))


def float_dtypes(jaxpr: Any) -> set[str]:
    """The floating dtypes of all results that have a dimension."""
    avals = [out.aval for eqn in equations(jaxpr) for out in eqn.outvars]
    return {
        str(aval.dtype)
        for aval in avals
        if aval.ndim > 0 and jnp.issubdtype(aval.dtype, jnp.floating)
    }


@per_first_model
def test_loss_falls_and_shapes_are_those_promised(name: str) -> None:
    model = ZOO[name]("tiny")
    step, state, batch = materialize(name, "tiny", seed=1)
    assert signature(batch) == signature(model.batch_shapes)
    assert signature(state)[1] == signature(model.state_shapes)[1]
    assert jax.tree.leaves(batch)[0].shape[0] % 8 == 0

    traces = []

    def counted(state: Any, batch: Any) -> Any:
        traces.append(name)
        return step(state, batch)

    # Compiling costs most here, and nothing of this depends on XLA's optimizer.
    jitted = jax.jit(counted, compiler_options={"xla_backend_optimization_level": 0})
    losses = []
    for _ in range(15):
        state, metrics = jitted(state, batch)
        losses.append(float(metrics["loss"]))
    # Once: the state that comes out goes back in without a new trace.
    assert len(traces) == 1
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.97 * losses[0]
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
    assert all(np.isfinite(leaf).all() for leaf in leaves)


@per_first_model
def test_step_returns_the_state_it_was_given_in_shape(name: str) -> None:
    model = build(name)
    state, metrics = jax.eval_shape(
        model.train_step, model.state_shapes, model.batch_shapes
    )
    assert signature(state) == signature(model.state_shapes)
    assert metrics["loss"].shape == ()


@per_model
def test_batches_are_a_function_of_the_seed(name: str) -> None:
    model = build(name)
    one, again, other = (model.make_batch(seed) for seed in (3, 3, 4))
    assert one.keys() == again.keys() == other.keys()
    assert all(np.array_equal(one[key], again[key]) for key in one)
    assert any(not np.array_equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "diffusion"])
def test_large_is_as_large_as_published(name: str) -> None:
    before = len(jax.live_arrays())
    params = parameters(build(name, "large").state_shapes)
    low, high = LARGE_PARAMS_MILLIONS[name]
    assert low <= params / 1e6 <= high
    assert len(jax.live_arrays()) - before < 20


@per_first_model
def test_large_traces_without_allocating(name: str) -> None:
    params = parameters(build(name, "large").state_shapes)
    before = len(jax.live_arrays())
    model = build(name, "large", depth=2)
    assert parameters(model.state_shapes) < params
    assert sum(1 for _ in equations(trace(model))) > 100
    assert len(jax.live_arrays()) - before < 20
    assert max((leaf.nbytes for leaf in jax.live_arrays()), default=0) < 2**24


def parameters(state: Any) -> int:
    """How many parameters a state of any of the models holds."""
    parts = (lambda s: s["params"], lambda s: s.params, lambda s: s[0])
    for part in parts:
        try:
            leaves = jax.tree.leaves(part(state))
        except (AttributeError, KeyError, TypeError):
            continue
        return sum(math.prod(leaf.shape) for leaf in leaves)
    raise AssertionError(f"no parameters in a {type(state).__name__}")


@per_model
def test_float64_leaves_no_other_float_anywhere(name: str) -> None:
    with jax.enable_x64(True):
        model = build(name, dtype="float64", optimizer=optax.sgd(1.0))
        dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(model.state_shapes)}
        assert "float32" not in dtypes
        assert float_dtypes(trace(model)) == {"float64"}
        state, _ = jax.eval_shape(
            model.train_step, model.state_shapes, model.batch_shapes
        )
        assert signature(state) == signature(model.state_shapes)


@pytest.mark.parametrize("name", [*FIRST, "vgg", "graph", "lora", "decode", "pinn"])
def test_bfloat16_computes_in_bfloat16_and_keeps_float32_params(name: str) -> None:
    model = build(name, dtype="bfloat16")
    state = model.state_shapes
    if name in FROZEN:  # weights that are not trained are in the dtype of compute
        state = {key: held for key, held in state.items() if key in TRAINED}
    dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(state)}
    assert name == "decode" or "float32" in dtypes
    assert "bfloat16" not in dtypes
    heavy = ("dot_general", "conv_general_dilated")
    results = [
        str(eqn.outvars[0].aval.dtype)
        for eqn in equations(trace(model))
        if eqn.primitive.name in heavy
    ]
    # Gates of the mixture stay in float32, and rightly; so do products of L-BFGS.
    assert results.count("bfloat16") > 0.75 * len(results)


@per_first_model
def test_another_optimizer_takes_the_place_of_the_models_own(name: str) -> None:
    own = build(name)
    sgd = build(name, optimizer=optax.sgd(1.0))
    own_count = len(jax.tree.leaves(own.state_shapes))
    sgd_count = len(jax.tree.leaves(sgd.state_shapes))
    assert sgd_count < own_count


def test_depth_is_the_number_of_blocks() -> None:
    counts = [len(jax.tree.leaves(build("vit", depth=d).state_shapes)) for d in (1, 3)]
    assert counts[1] > 2 * counts[0]
    assert shallow((3, 4, 6, 3), 2) == (1, 1, 0, 0)
    assert sum(shallow((3, 4, 6, 3), 9)) == 9


def test_top2_gating_respects_capacity_and_weights() -> None:
    logits = jax.random.normal(jax.random.key(0), (2, 32, 8))
    combine, aux = top2_gating(logits, capacity=4)
    dispatch = np.asarray(combine) > 0
    # A slot of an expert holds one token at most; a token has two places at most.
    assert dispatch.sum(axis=1).max() == 1
    assert dispatch.sum(axis=(2, 3)).max() == 2
    assert dispatch.sum() < 2 * 2 * 32
    totals = np.asarray(combine).sum(axis=(2, 3))
    kept = dispatch.any(axis=(2, 3))
    np.testing.assert_allclose(totals, kept.astype(np.float32), atol=1e-6)
    assert float(aux) > 0

    roomy, _ = top2_gating(logits, capacity=64)
    assert (np.asarray(roomy) > 0).sum() == 2 * 2 * 32


def test_relative_buckets_order_and_causality() -> None:
    causal = relative_buckets(40, 40, bidirectional=False, buckets=32, max_distance=128)
    assert (causal[np.triu_indices(40)] == 0).all()
    assert (np.diff(causal[-1]) <= 0).all()
    both = relative_buckets(40, 40, bidirectional=True, buckets=32, max_distance=128)
    assert both.max() < 32
    assert (both[np.triu_indices(40, 1)] >= 16).all()


def test_a_recurrence_by_scan_is_one_by_steps() -> None:
    cfg = recurrence.SIZES["tiny"]
    module = recurrence.Recurrence(cfg, jnp.float32, jax.random.key(0))
    layer = jax.jit(lambda x: module(x))
    x = jax.random.normal(jax.random.key(1), (7, cfg.recurrent))
    whole = layer(x)
    # The first rows do not know of the last; each row goes on from the one before.
    np.testing.assert_allclose(layer(x[:4]), whole[:4], rtol=1e-5, atol=1e-6)
    alone = jax.vmap(lambda row: layer(row[None])[0])(x)
    kept = (whole[1:] - alone[1:]) / whole[:-1]
    assert ((kept > 0) & (kept < 1)).all()


@pytest.mark.parametrize(("side", "window", "shift"), [(8, 4, 2), (14, 7, 3)])
def test_shifted_windows_see_neighbours_only(
    side: int, window: int, shift: int
) -> None:
    x = jnp.arange(2 * side * side * 3.0).reshape(2, side, side, 3)
    there = to_windows(x, window)
    np.testing.assert_array_equal(from_windows(there, side, window), x)
    # Two places that a window joins across the border were far apart.
    places = jnp.stack(jnp.meshgrid(*[jnp.arange(side)] * 2, indexing="ij"), -1)[None]
    rolled = jnp.roll(places, (-shift, -shift), axis=(1, 2))
    at = np.asarray(to_windows(rolled, window))[0]
    apart = np.abs(at[:, :, None] - at[:, None]).max(axis=-1)
    np.testing.assert_array_equal(region_mask(side, window, shift), apart < window)


def test_decoding_with_a_cache_is_the_whole_forward_pass() -> None:
    cfg = llama.Config(32, 16, 24, 4, 2, layers=2, seq=6, batch=3, rank=2)
    params = llama.init_params(jax.random.key(0), cfg, jnp.float32)
    adapters = lora.init_adapters(jax.random.key(1), cfg, jnp.float32)
    tokens = jax.random.randint(jax.random.key(2), (cfg.batch, cfg.seq), 0, cfg.vocab)
    # The adapters' second factors are zero.
    expected = jax.jit(lora.forward)(params, adapters, tokens)
    shape = (cfg.layers, cfg.batch, cfg.seq, cfg.kv_heads, cfg.head)
    cache = {"k": jnp.zeros(shape), "v": jnp.zeros(shape)}
    one = jax.jit(decode.forward)
    for place in range(cfg.seq):
        rows = jnp.full(cfg.batch, place)
        logits, cache = one(params, cache, tokens[:, place], rows)
        np.testing.assert_allclose(logits, expected[:, place], rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(
    "options", [{"name": "bart"}, {"size": "huge"}, {"dtype": "int8"}]
)
def test_unknown_names_are_refused(options: dict[str, str]) -> None:
    known = {"name": "vit", "size": "tiny", "dtype": "float32"}
    with pytest.raises(ValueError, match="choose one of"):
        build(**{**known, **options})


def test_float64_without_x64_is_refused() -> None:
    with jax.enable_x64(False), pytest.raises(ValueError, match="jax_enable_x64"):
        build("vit", dtype="float64")


def test_importing_the_table_imports_no_flax() -> None:
    code = "import sys, benchmarks.models; sys.exit('flax' in sys.modules)"
    path = ":".join(entry or "." for entry in sys.path)
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        env={"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
    )
