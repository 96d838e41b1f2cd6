"""Pins: what the user fixes stays fixed, and what does not fit is said at once."""

from __future__ import annotations

import pytest

from rhino_jax.errors import PinError
from rhino_jax.ir.mesh import Mesh
from rhino_jax.search.pins import matches, names_in
from rhino_jax.search.specs import spec_layout, spec_problems
from tests.search.steps import HIDDEN, MLP, made

D, T = ("data",), ("tensor",)
MESH = {"data": 2, "tensor": 4}


def test_a_pin_holds_for_the_parameter_and_its_slots() -> None:
    plan = made(MLP, "data_parallel", {"params/head": ((), T)}, **MESH)
    assert plan.input("state/params/head") == "[-,tensor/2]"
    assert plan.input("state/slots/head") == "[-,tensor/2]"
    assert plan.input("state/params/layers/up") == "[-,-,-]"


def test_a_slot_may_be_pinned_apart() -> None:
    pins = {"params/head": ((), T), "slots/head": (D,)}
    plan = made(MLP, "data_parallel", pins, **MESH)
    assert plan.input("state/params/head") == "[-,tensor/2]"
    assert plan.input("state/slots/head") == "[data/4,-]"


def test_a_pin_over_two_axes_has_the_first_outermost() -> None:
    plan = made(MLP, "zero1", {"state/params/head": ((*T, *D),)}, **MESH)
    assert plan.input("state/params/head") == "[tensor/2.data/1,-]"


def test_a_glob_pins_all_that_match() -> None:
    plan = made(MLP, "data_parallel", {"*/layers/*": ((), D)}, **MESH)
    for which in ("params", "slots"):
        assert plan.input(f"state/{which}/layers/up") == "[-,data/4,-]"
        assert plan.input(f"state/{which}/layers/down") == f"[-,data/{HIDDEN // 2},-]"


def test_a_pinned_batch_is_split_as_asked() -> None:
    plan = made(MLP, "data_parallel", {"batch/x": (T,)}, **MESH)
    assert plan.input("batch/x") == "[tensor/4,-]"
    assert plan.input("batch/y") == "[data/8.tensor/2,-]"


def test_what_is_computed_by_a_pin_on_a_name() -> None:
    """A hidden activation pinned whole over the tensor axis is gathered there."""
    free = made(MLP, "megatron", **MESH)
    assert names_in(free.subject.program) == {"hidden"}
    assert "all-gather" not in free.counts()
    pinned = made(MLP, "megatron", {"hidden": (D,)}, **MESH)
    gathered = {c.shape for c in pinned.sent if c.kind == "all-gather"}
    assert (16, HIDDEN) in gathered


WRONG = {
    "unknown, near": (
        {"params/heed": (T,)},
        "pin 'params/heed': no such path or name; did you mean state/params/head",
    ),
    "unknown, by its end": ({"zzzzzz/head": (T,)}, "state/params/head"),
    "unknown name": ({"hiden": (D,)}, "did you mean hidden"),
    "does not divide": (
        {"slots/head": ((*D, *T),), "params/layers/up": (T,)},
        "pin 'state/params/layers/up': dimension 0 of size 3 does not divide into 4",
    ),
    "unknown axis": (
        {"params/layers/up": ((), ("data", "tensor"), ("more",))},
        "no axis 'more' in mesh (data=2, tensor=4)",
    ),
    "near axis": ({"params/head": (("tenser",),)}, "did you mean 'tensor'?"),
    "twice": ({"params/head": (T, T)}, "an axis is used twice"),
    "too long": ({"batch/x": (D, (), ())}, "3 entries for 2 dimensions (16, 8)"),
    "interior": ({"hidden": (D, (), T)}, "3 entries for 2 dimensions"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit(name: str) -> None:
    pins, expected = WRONG[name]
    with pytest.raises(PinError) as caught:
        made(MLP, "data_parallel", pins, **MESH)
    assert expected in str(caught.value)


def test_everything_wrong_is_said_at_once() -> None:
    pins = {"params/heed": (T,), "params/layers/up": (T,), "hidden": (("w",),)}
    with pytest.raises(PinError) as caught:
        made(MLP, "data_parallel", pins, **MESH)
    lines = str(caught.value).splitlines()
    assert lines[0] == "pins that do not fit:"
    assert len({line for line in lines if line.startswith("  - ")}) == 3
    assert "steps.py:" in str(caught.value)  # where the name was given
    assert lines[-1] == "Fix or drop these pins."


@pytest.mark.parametrize(
    ("pattern", "path", "fits"),
    [
        ("a/b", "a/b", True),
        ("b", "a/b", True),
        ("b", "a/bb", False),
        ("a", "a/b", False),
        ("a/*", "a/b/c", True),
        ("*/[uv]p", "x/up", True),
        ("A/b", "a/b", False),
    ],
)
def test_a_key_means_a_path_its_end_or_a_glob(
    pattern: str, path: str, fits: bool
) -> None:
    assert matches(pattern, path) == fits


def test_a_spec_is_a_contiguous_layout() -> None:
    mesh = Mesh.of(**MESH)
    assert str(spec_layout((D,), (8, 6), mesh)) == "[data/4,-]"
    assert str(spec_layout(((*D, *T),), (16,), mesh)) == "[data/8.tensor/2]"
    assert spec_problems(((*D, *T),), (12,), mesh) == [
        "dimension 0 of size 12 does not divide into 8 (data×tensor)"
    ]
