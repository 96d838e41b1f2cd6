"""Mixtures of experts, in the ways people write them: tokens travel, experts stay.

Experts and tokens are split over one axis. What reaches the experts are slots: so many
rows of each group (or of all tokens) for each expert, whatever the router says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import rhino_jax as rhino
from rhino_jax.ir.mesh import Mesh
from rhino_jax.plan import make_plan
from rhino_jax.search.planner import Found, Request, search
from rhino_jax.search.prices import AlphaBeta
from rhino_jax.search.specs import Spec
from rhino_jax.search.subject import Subject
from rhino_jax.sent import collectives
from tests.search.steps import f32, subject_of

GROUPS, ROWS, WIDTH, HIDDEN, EXPERTS = 16, 32, 32, 128, 16
TOKENS, DEVICES, FLOAT = GROUPS * ROWS, 8, 4
SLOTS = 2 * TOKENS
"""Of all experts together: two for every token, so that few are dropped."""
MESH = {"x": DEVICES}
PINS: dict[str, Spec] = {name: (("x",),) for name in ("params/up", "params/down", "x")}

Mixture = Callable[[Any, jax.Array], jax.Array]


def share(elements: int) -> int:
    """Bytes that a device sends of ``elements`` spread over all, to all others."""
    return FLOAT * elements // DEVICES * (DEVICES - 1) // DEVICES


def feed_forward(params: Any, slots: jax.Array) -> jax.Array:
    """[experts, ..., width] to the same."""
    h = jnp.tanh(jnp.einsum("e...d,edf->e...f", slots, params["up"]))
    return jnp.einsum("e...f,efd->e...d", h, params["down"])


def routed(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The expert of every token, and how much it counts."""
    shares = jax.nn.softmax(x @ params["gate"])
    return jnp.argmax(shares, -1), jnp.max(shares, -1)


def masks(params: Any, x: jax.Array) -> jax.Array:
    """Dispatch and combine are products with one-hot masks (GShard)."""
    expert, weight = routed(params, x)
    chosen = jax.nn.one_hot(expert, EXPERTS, dtype=x.dtype)
    place = jnp.sum((jnp.cumsum(chosen, 1) - chosen) * chosen, -1)
    slot = jax.nn.one_hot(place.astype(int), SLOTS // GROUPS // EXPERTS, dtype=x.dtype)
    send = chosen[..., None] * slot[..., None, :]
    y = feed_forward(params, jnp.einsum("gsec,gsd->egcd", send, x))
    return jnp.einsum("gsec,egcd->gsd", send * weight[..., None, None], y)


def sorted_places(expert: jax.Array, slots: int) -> tuple[jax.Array, jax.Array]:
    """Tokens in the order of their experts, and the slot of each (``slots``: none)."""
    order = jnp.argsort(expert, stable=True)
    ranked, each = expert[order], slots // EXPERTS
    place = (
        jnp.arange(len(expert)) - jnp.searchsorted(ranked, jnp.arange(EXPERTS))[ranked]
    )
    return order, jnp.where(place < each, ranked * each + place, slots)


def scattered(params: Any, x: jax.Array, slots: int) -> jax.Array:
    """[tokens, width]: sorted, written to their slots, read back, put in order."""
    expert, weight = routed(params, x)
    order, place = sorted_places(expert, slots)
    empty = jnp.zeros((slots, WIDTH), x.dtype)
    held = empty.at[place].set(x[order], mode="drop", unique_indices=True)
    y = feed_forward(params, held.reshape(EXPERTS, -1, WIDTH)).reshape(slots, WIDTH)
    back = y.at[place].get(mode="fill", fill_value=0)
    done = jnp.zeros_like(x).at[order].set(back, unique_indices=True)
    return done * weight[:, None]


def gathered(params: Any, x: jax.Array, slots: int) -> jax.Array:
    """The same by tables of who sits where, so that only gathers touch tokens."""
    expert, weight = routed(params, x)
    order, place = sorted_places(expert, slots)
    token = jnp.full(slots, len(x)).at[place].set(order, mode="drop")
    mine = jnp.zeros(len(x), int).at[order].set(place)
    held = x.at[token].get(mode="fill", fill_value=0)
    y = feed_forward(params, held.reshape(EXPERTS, -1, WIDTH)).reshape(slots, WIDTH)
    return y.at[mine].get(mode="fill", fill_value=0) * weight[:, None]


def all_tokens(layer: Callable[..., jax.Array]) -> Mixture:
    """Every expert has its slots for all tokens together."""

    def mixture(params: Any, x: jax.Array) -> jax.Array:
        return layer(params, x.reshape(TOKENS, WIDTH), SLOTS).reshape(x.shape)

    return mixture


def grouped(layer: Callable[..., jax.Array]) -> Mixture:
    """Every expert has its slots in every group; experts see all groups at once."""

    def mixture(params: Any, x: jax.Array) -> jax.Array:
        return jax.vmap(lambda x: layer(params, x, SLOTS // GROUPS))(x)

    return mixture


def ragged(params: Any, x: jax.Array) -> jax.Array:
    """No slots: sorted tokens, and products in groups of them."""
    rows = x.reshape(-1, WIDTH)
    expert, weight = routed(params, rows)
    order, sizes = jnp.argsort(expert), jnp.bincount(expert, length=EXPERTS)
    h = jnp.tanh(lax.ragged_dot(rows[order], params["up"], sizes))
    y = lax.ragged_dot(h, params["down"], sizes)
    done = jnp.zeros_like(rows).at[order].set(y, unique_indices=True)
    return (done * weight[:, None]).reshape(x.shape)


def step_of(mixture: Mixture) -> Any:
    """A layer, the mixture, and a step of plain descent."""

    def loss_of(params: Any, x: jax.Array) -> jax.Array:
        return jnp.mean(mixture(params, jnp.tanh(x @ params["before"])) ** 2)

    def step(params: Any, x: jax.Array) -> Any:
        value, grads = jax.value_and_grad(loss_of)(params, x)
        return jax.tree.map(lambda p, g: p - g, params, grads), value

    return step


SHAPES = {
    "before": (WIDTH, WIDTH),
    "gate": (WIDTH, EXPERTS),
    "up": (EXPERTS, WIDTH, HIDDEN),
    "down": (EXPERTS, HIDDEN, WIDTH),
}


def found(
    mixture: Mixture, pins: Any = PINS, rows: int = ROWS
) -> tuple[Subject, Found]:
    params = {name: f32(*shape) for name, shape in SHAPES.items()}
    subject = subject_of(step_of(mixture), params, f32(GROUPS, rows, WIDTH))
    request = Request(Mesh.of(**MESH), AlphaBeta(), replicate_heavy=False, pins=pins)
    return subject, search(subject, request)


DENSE = ("all-reduce", WIDTH * WIDTH), ("all-reduce", WIDTH * EXPERTS)
"""The gradients of what every token reads."""


def sent(subject: Subject, assignment: Any) -> Counter[tuple[str, int]]:
    """Bytes by kind and elements of the whole value, scalars and ``DENSE`` left out."""
    bytes_of: Counter[tuple[str, int]] = Counter()
    for one in collectives(subject.program, assignment, Mesh.of(**MESH)):
        what = one.kind, int(np.prod(one.shape))
        if one.shape and what not in DENSE:
            bytes_of[what] += one.count * one.wire_bytes
    return bytes_of


@pytest.mark.parametrize("form", ["masks", "scattered", "gathered"])
def test_slots_of_groups_go_by_all_to_all(form: str) -> None:
    """To the experts and back, and once more each for the gradients; nothing else."""
    mixtures = {"scattered": grouped(scattered), "gathered": grouped(gathered)}
    subject, answer = found(mixtures.get(form, masks))
    slots = SLOTS * WIDTH
    assert sent(subject, answer.assignment) == {("all-to-all", slots): 4 * share(slots)}


@pytest.mark.parametrize("layer", [scattered, gathered])
def test_of_all_tokens_too_once_they_are_cut_by_width(layer: Any) -> None:
    """Where slots are of all tokens, any device may hold those of any token: rows are
    looked up in columns of the width, and an all-to-all each makes tokens, columns and
    experts' slots of one another. All see which expert every token has, a number each.
    """
    subject, answer = found(all_tokens(layer))
    each = sent(subject, answer.assignment)
    slots, rows = SLOTS * WIDTH, TOKENS * WIDTH
    assert each.pop(("all-to-all", slots)) == 4 * share(slots)
    assert each.pop(("all-to-all", rows)) == 2 * share(rows)
    numbers = FLOAT * TOKENS * (DEVICES - 1) // DEVICES
    assert each == {
        ("all-gather", TOKENS): 2 * numbers,
        ("reduce-scatter", TOKENS): numbers,
    }


def test_products_in_groups_of_rows_split_the_hidden_dimension() -> None:
    """Rows that are sorted lie with nobody's experts in particular. Left to choose, the
    search cuts every expert along its hidden dimension: tokens are gathered, and terms
    of them scattered, forward and backward; of the weights nothing is sent."""
    subject, answer = found(ragged, {"x": PINS["x"]})
    places = {path: i for i, path in enumerate(subject.output_paths)}
    outputs = answer.assignment.outputs
    assert str(outputs[places["0/up"]]) == f"[-,-,x/{HIDDEN // DEVICES}]"
    assert str(outputs[places["0/down"]]) == f"[-,x/{HIDDEN // DEVICES},-]"
    each = sent(subject, answer.assignment)
    rows = FLOAT * TOKENS * WIDTH * (DEVICES - 1) // DEVICES
    assert each.pop(("all-gather", TOKENS * WIDTH)) == 2 * rows
    assert each.pop(("reduce-scatter", TOKENS * WIDTH)) == 2 * rows
    assert {elements for _, elements in each} == {TOKENS}


def test_experts_that_are_pinned_are_moved_or_answer_for_their_rows() -> None:
    """With many tokens, experts are cut along the hidden dimension by an all-to-all,
    each in the forward and the backward pass, and so are their gradients. With few,
    every device works on the rows of its experts, and hidden rows are terms of a sum.
    """
    weights = EXPERTS * WIDTH * HIDDEN
    subject, answer = found(ragged)
    each = sent(subject, answer.assignment)
    assert ("all-gather", weights) not in each
    assert each["all-to-all", weights] == 6 * share(weights)
    few = 1
    subject, answer = found(ragged, rows=few)
    each = sent(subject, answer.assignment)
    assert max(elements for _, elements in each) == GROUPS * few * HIDDEN


FORMS = {
    "groups": grouped(scattered),
    "scattered": all_tokens(scattered),
    "gathered": all_tokens(gathered),
    "ragged": ragged,
}


@pytest.mark.parametrize("form", FORMS)
def test_it_is_the_undecorated_step(form: str, x64: None) -> None:
    rng = np.random.default_rng(0)
    params = {name: rng.normal(size=shape) / 4 for name, shape in SHAPES.items()}
    x, step = rng.normal(size=(GROUPS, ROWS, WIDTH)), step_of(FORMS[form])
    subject = subject_of(step, params, x)
    mesh = Mesh.of(**MESH)
    request = Request(mesh, AlphaBeta(), replicate_heavy=False, pins=PINS)
    done = search(subject, request).assignment
    plan = make_plan(
        subject.program, done, mesh, subject.input_paths, subject.output_paths
    )
    run = rhino.auto_parallel(plan=plan, mesh=MESH, donate=False)(step)
    got, want = run(params, x), jax.jit(step)(params, x)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), got, want
    )
