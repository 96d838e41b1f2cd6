"""Rules and choices: what a split factor means, against running the loops."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rhino_jax.errors import RuleError
from rhino_jax.ir.factors import (
    KINDS,
    Choice,
    Factor,
    Flow,
    Rule,
    choice_problems,
    follow,
    layouts,
    parse_choice,
)
from rhino_jax.ir.layout import Split
from rhino_jax.ir.mesh import Mesh
from rhino_jax.ir.notation import parse_rule
from tests.layouts import coordinates, held

MESH = Mesh.of(x=2, y=3)
SUMS = Flow("sum", (0,), (0,))
RULES = {
    "matmul": parse_rule("ik,kj->ij", [(4, 6), (6, 3)], [(4, 3)]),
    "reshape": parse_rule("(ab)c->a(bc)", [(12, 4)], [(6, 8)]),
    "split": parse_rule("(pi)->i,i", [(12,)], [(6,), (6,)], {"p": "blocked"}),
    "maximum": parse_rule("ij->i", [(6, 4)], [(6,)], operators={"j": "max"}),
    "flow": parse_rule("ij->ji", [(6, 4)], [(4, 6)], flows=[SUMS]),
}
RANDOM = st.randoms(use_true_random=False)


def choices(rule: Rule, rng: random.Random) -> Choice:
    """A lawful, even choice: each axis takes a digit of a factor, a flow or nothing."""
    choice = Choice()
    for axis in MESH.names:
        options = [choice]
        for factor in rule.factors:
            for stride in range(1, factor.size):
                tried = choice.with_split(factor.name, Split(axis, stride))
                even = factor.size % (stride * MESH.size(axis)) == 0
                if even and not choice_problems(rule, tried, MESH):
                    options.append(tried)
        options += [choice.with_flow(axis, n) for n in range(len(rule.flows))]
        choice = rng.choice(options)
    return choice


def iterations(rule: Rule, choice: Choice, at: dict[str, int]) -> Iterator[dict]:
    """The turns of the op's loops that the device at ``at`` makes."""
    ranges = []
    for factor in rule.factors:
        mine = [
            n
            for n in range(factor.size)
            if all(
                n // s.stride % MESH.size(s.axis) == at[s.axis]
                for s in choice.on(factor.name)
            )
        ]
        ranges.append(mine)
    names = [f.name for f in rule.factors]
    for turn in itertools.product(*ranges):
        yield dict(zip(names, turn, strict=True))


def touched(rule: Rule, dims: tuple, turns: list[dict]) -> set[tuple[int, ...]]:
    found = set()
    for turn in turns:
        element = []
        for dim in dims:
            index = 0
            for name in dim:
                index = index * rule.factor(name).size + turn[name]
            element.append(index)
        found.add(tuple(element))
    return found


@pytest.mark.parametrize("name", RULES)
@given(rng=RANDOM)
@settings(max_examples=25)
def test_each_device_holds_what_its_loops_touch(name: str, rng: random.Random) -> None:
    rule = RULES[name]
    choice = choices(rule, rng)
    operands, results = layouts(rule, choice)
    values = [*zip(rule.operands, operands, strict=True)]
    values += [*zip(rule.results, results, strict=True)]
    for at in coordinates(MESH):
        turns = list(iterations(rule, choice, at))
        for dims, layout in values:
            shape = [math.prod(rule.factor(name).size for name in dim) for dim in dims]
            mine = set(itertools.product(*held(layout, shape, MESH, at)))
            assert mine == touched(rule, dims, turns), f"{choice}: {layout}"


@pytest.mark.parametrize("name", RULES)
@given(rng=RANDOM)
@settings(max_examples=25)
def test_results_are_partial_where_a_reduction_is_split(
    name: str, rng: random.Random
) -> None:
    rule = RULES[name]
    choice = choices(rule, rng)
    operands, results = layouts(rule, choice)
    terms = {
        (s.axis, rule.factor(n).operator)
        for n, digits in choice.splits
        for s in digits
        if rule.factor(n).operator
    }
    flowing = {(axis, rule.flows[n].operator) for axis, n in choice.flows}
    assert all(set(layout.partial) == terms | flowing for layout in results)
    assert all(set(layout.partial) == flowing for layout in operands)


@pytest.mark.parametrize("name", RULES)
@given(rng=RANDOM)
@settings(max_examples=25)
def test_follow_finds_the_factor_of_every_split(name: str, rng: random.Random) -> None:
    """The inverse of layouts, dimension by dimension and digit by digit."""
    rule = RULES[name]
    choice = choices(rule, rng)
    operands, results = layouts(rule, choice)
    values = [*zip(rule.operands, operands, strict=True)]
    values += [*zip(rule.results, results, strict=True)]
    for dims, layout in values:
        for d, dim in enumerate(layout.dims):
            for split in dim:
                found = follow(rule, dims, d, split, MESH.size(split.axis))
                assert found is not None
                assert found[1] in choice.on(found[0])


def test_follow_gives_up_on_a_digit_across_factors() -> None:
    rule = RULES["reshape"]
    assert follow(rule, rule.operands[0], 0, Split("y", 1), 3) is None
    assert follow(rule, rule.operands[0], 0, Split("x", 3), 2) is None
    assert follow(rule, rule.operands[0], 0, Split("y", 4), 3) == ("a", Split("y", 2))


@pytest.mark.parametrize("name", RULES)
@given(rng=RANDOM)
def test_a_choice_is_read_back(name: str, rng: random.Random) -> None:
    choice = choices(RULES[name], rng)
    assert parse_choice(str(choice)) == choice
    for axis in choice.axes:
        assert axis not in choice.without(axis).axes


def test_addends_are_wanted_partial() -> None:
    """The operand of a scatter-add enters a sum once, though the loop is split."""
    add = Factor("n", 6, "reduction", "sum", addends=(0,))
    rule = Rule((Factor("i", 4), add), ((("i",),), (("n",),)), ((("i",),),))
    operands, results = layouts(rule, parse_choice("n: x/3"))
    assert [str(x) for x in (*operands, *results)] == [
        "[-]+sum(x)",
        "[x/3]",
        "[-]+sum(x)",
    ]


FAULTS = {
    "p: x/1": "factor 'p' is blocked: must be whole",
    "q: x/1": "no factor 'q'",
    "i: x/3.y/1; j: x/2": "an axis is used twice",
    "~1: x": "no flow 1 over 'x'",
    "j: y/2": "split unevenly",
    "w: x/2": "window and can not be strided",
    "i: y/1": "6 is not a multiple of",
    "w: y/3": "window factor",
}


@pytest.mark.parametrize("text", FAULTS)
def test_a_choice_that_can_not_be_carried_out(text: str) -> None:
    rule = parse_rule(
        "(pj)iwg->p(ij)wg",
        [(8, 6, 8, 4)],
        [(2, 24, 8, 4)],
        {"p": "blocked", "w": "window", "g": "indexed"},
        flows=[SUMS],
    )
    mesh = Mesh.of(x=2, y=4) if text == "i: y/1" else MESH
    found = choice_problems(rule, parse_choice(text), mesh)
    assert any(FAULTS[text] in what for what in found), found


def test_a_ragged_factor_must_be_outermost() -> None:
    assert not choice_problems(RULES["matmul"], parse_choice("i: y/2"), MESH)
    operands, results = layouts(RULES["matmul"], parse_choice("i: y/2"))
    assert (str(operands[0]), str(results[0])) == ("[y/2,-]", "[y/2,-]")


@pytest.mark.parametrize("kind", ["parallel", "indexed", "positional"])
def test_a_factor_that_must_be_even_is_not_ragged_whatever_its_kind(kind: str) -> None:
    for even in (False, True):
        rule = Rule((Factor("g", 4, kind, even=even),), ((("g",),),), ((("g",),),))
        found = choice_problems(rule, parse_choice("g: y/2"), MESH)
        assert any("split unevenly" in what for what in found) == even


CARETS = {
    "ik;kj->ij": (";", 2),
    "ik,kj->i?": ("?", 8),
    "(ik,kj->ij": ("(", 0),
}


@pytest.mark.parametrize("text", CARETS)
def test_a_caret_stands_under_the_fault(text: str) -> None:
    bad, column = CARETS[text]
    shapes = [(2, 2)] * (text.split("->")[0].count(",") + 1)
    with pytest.raises(RuleError) as caught:
        parse_rule(text, shapes, [(2, 2)])
    message, shown, caret = str(caught.value).splitlines()
    assert message == f"unexpected {bad!r} in a rule:"
    assert shown.strip() == text
    assert caret.index("^") - shown.index(text) == column


BROKEN = {
    "ij": ("needs one '->'", (4, 6)),
    "i->j->k": ("needs one '->'", (4, 6)),
    "ij,jk->ik": ("2 terms for 1 shapes", (4, 6)),
    "ijk->ij": ("3 dimensions in a term for shape (4, 6)", (4, 6)),
    "i(jk)->i": ("no size follows for factors ['j', 'k']", (4,)),
    "ij->ji": ("the rule does not fit the shapes", (4, 6)),
}


@pytest.mark.parametrize("text", BROKEN)
def test_a_rule_that_does_not_fit(text: str) -> None:
    expected, result = BROKEN[text]
    with pytest.raises(RuleError) as caught:
        parse_rule(text, [(4, 6)], [result])
    assert expected in str(caught.value)


def test_text_of_a_rule() -> None:
    assert RULES["reshape"].text == "(ab)c->a(bc)"
    assert RULES["split"].text == "(pi)->i,i {p:blocked}"
    assert RULES["maximum"].text == "ij->i {j:reduction=max}"


def test_kinds_say_why() -> None:
    assert {name for name, kind in KINDS.items() if not kind.split} == {"blocked"}
    assert all(kind.why for kind in KINDS.values())
