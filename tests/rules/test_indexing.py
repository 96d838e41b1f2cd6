"""Rules of gather, scatter and dynamic slices, as text."""

from __future__ import annotations

import pytest

from rhino_jax.ir.factors import Choice, Flow, Split, layouts
from rhino_jax.ir.program import Op, Program, Value
from rhino_jax.rules import rule_of

GATHER = ("offset_dims", "collapsed_slice_dims", "start_index_map",
          "operand_batching_dims", "start_indices_batching_dims")  # fmt: skip
SCATTER = ("update_window_dims", "inserted_window_dims", "scatter_dims_to_operand_dims",
           "operand_batching_dims", "scatter_indices_batching_dims")  # fmt: skip


def rule(kind, reads, makes, dtype="float32", **params):
    dtypes = [dtype, "int32" if "update" not in kind else dtype, dtype]
    ins = tuple(range(len(reads)))
    values = tuple(
        Value(shape, dtypes[min(i, 2)]) for i, shape in enumerate((*reads, makes))
    )
    op = Op(kind, ins, (len(ins),), tuple(sorted(params.items())))
    return rule_of(Program(values, ins, (op,), (len(ins),)), op)


def gather(x, i, y, numbers, sizes, dtype="float32", mode="CLIP", fill=None):
    dims = tuple(zip(GATHER, numbers, strict=True))
    return rule("gather", [x, i], y, dtype, dimension_numbers=dims, slice_sizes=sizes,
                mode=mode, fill_value=fill)  # fmt: skip


def scatter(kind, x, i, u, numbers, dtype="float32", unique=False, update=None):
    dims = tuple(zip(SCATTER, numbers, strict=True))
    return rule(kind, [x, i, u], x, dtype, dimension_numbers=dims,
                unique_indices=unique, update_jaxpr=update, mode="CLIP")  # fmt: skip


ROWS = ((2,), (0,), (0,), (), ())
ALONG = ((), (1,), (1,), (0,), (0,))
EMBED = ((8, 4), (2, 3, 1), (2, 3, 4), ROWS)
KEY = "key<fry>"


def embedding(**more):
    return gather(*EMBED, (1, 4), **more)


def slicing(dtype="float32"):
    reads = [(8, 8, 4), (), (), ()]
    return rule("dynamic_slice", reads, (1, 2, 4), dtype, slice_sizes=(1, 2, 4))


def updating(dtype="float32"):
    reads = [(8, 8, 4), (1, 2, 4), (), (), ()]
    return rule("dynamic_update_slice", reads, (8, 8, 4), dtype)


CASES = {
    "embedding": (embedding(), "ab,cd()->cdb {a:indexed=sum}"),
    "of booleans": (embedding(dtype="bool"), "ab,cd()->cdb {a:indexed=or}"),
    "of keys": (embedding(dtype=KEY), "ab,cd()->cdb {a:blocked}"),
    "along axis": (gather((4, 8), (4, 3, 1), (4, 3), ALONG, (1, 1)),
                   "ab,ac()->ac {b:indexed=sum}"),
    "row of one": (gather((8, 4), (1,), (1, 4), ((0, 1), (), (0,), (), ()), (1, 4)),
                   "ab,()->()b {a:indexed=sum}"),
    "two lookups": (gather((8, 2, 4), (5, 2), (5, 2), ((1,), (0, 2), (2, 0), (), ()),
                           (1, 2, 1)),
                    "abc,de->db {a:indexed=sum, c:indexed=sum, e:blocked}"),
    "windows": (gather((8, 4), (5, 1), (5, 3, 4), ((1, 2), (), (0,), (), ()), (3, 4)),
                "ac,d()->dbc {a:blocked, b:blocked}"),
    "not pointed at": (gather((8, 4), (5, 1), (5,), ((), (0, 1), (0,), (), ()), (1, 1)),
                       "ab,c()->c {a:indexed=sum, b:blocked}"),
    "pointed at, whole": (gather((8, 4), (5, 2), (5, 4), ((1,), (0,), (0, 1), (), ()),
                                 (1, 4)),
                          "ab,cd->cb {a:indexed=sum, d:blocked}"),
    "add": (scatter("scatter-add", *EMBED),
            "ab,cd(),cdb->ab {a:indexed, c:reduction=sum, d:reduction=sum}"),
    "subtract": (scatter("scatter-sub", *EMBED),
                 "ab,cd(),cdb->ab {a:indexed, c:reduction=sum, d:reduction=sum}"),
    "max": (scatter("scatter-max", *EMBED),
            "ab,cd(),cdb->ab {a:indexed, c:reduction=max, d:reduction=max}"),
    "max of complex": (scatter("scatter-max", *EMBED, dtype="complex64"),
                       "ab,cd(),cdb->ab {a:indexed, c:blocked, d:blocked}"),
    "add of booleans": (scatter("scatter-add", *EMBED, dtype="bool"),
                        "ab,cd(),cdb->ab {a:indexed, c:blocked, d:blocked}"),
    "multiply": (scatter("scatter-mul", *EMBED),
                 "ab,cd(),cdb->ab {a:indexed, c:blocked, d:blocked}"),
    "set": (scatter("scatter", *EMBED, unique=True),
            "ab,cd(),cdb->ab {a:indexed, c:blocked, d:blocked}"),
    "set keys": (scatter("scatter", *EMBED, dtype=KEY),
                 "ab,cd(),cdb->ab {a:blocked, c:blocked, d:blocked}"),
    "add along axis": (scatter("scatter-add", (4, 8), (4, 3, 1), (4, 3), ALONG),
                       "ab,ac(),ac->ab {b:indexed, c:reduction=sum}"),
    "set windows": (scatter("scatter", (8, 4), (5, 1), (5, 3, 4),
                            ((1, 2), (), (0,), (), ())),
                    "ac,d(),dbc->ac {a:blocked, b:blocked, d:blocked}"),
    "slice": (slicing(), "abd,,,->()cd {a:indexed=sum, b:indexed=sum, c:positional}"),
    "slice of keys": (slicing(KEY),
                      "abd,,,->()cd {a:blocked, b:blocked, c:blocked}"),
    "update": (updating(),
               "abd,()cd,,,->abd {a:positional, b:positional, c:blocked}"),
    "update of keys": (updating(KEY),
                       "abd,()cd,,,->abd {a:blocked, b:blocked, c:blocked}"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_rule(name):
    found, text = CASES[name]
    assert found.text == text


def fills(fill):
    return embedding(mode="FILL_OR_DROP", fill=fill)


FLOWS = {
    "gather": (embedding(), Flow("sum", (0,))),
    "gather or not a number": (fills(float("nan")), Flow("sum", (0,))),
    "gather or zero": (fills(0), Flow("sum", (0,))),
    "gather or one": (fills(1), None),
    "gather or the lowest": (fills(-(2**31)), None),
    "gather keys": (embedding(dtype=KEY), None),
    "add": (scatter("scatter-add", *EMBED), Flow("sum", (0, 2))),
    "multiply": (scatter("scatter-mul", *EMBED), Flow("sum", (0,))),
    "min": (scatter("scatter-min", *EMBED), Flow("min", (0, 2))),
    "max of complex": (scatter("scatter-max", *EMBED, dtype="complex64"), None),
    "set": (scatter("scatter", *EMBED), None),
    "set once each": (scatter("scatter", *EMBED, unique=True), Flow("sum", (0, 2))),
    "apply": (scatter("scatter", *EMBED, unique=True, update="<Jaxpr>"), None),
    "slice": (slicing(), Flow("sum", (0,))),
    "slice of keys": (slicing(KEY), None),
    "update": (updating(), Flow("sum", (0, 1))),
    "update of keys": (updating(KEY), None),
}


@pytest.mark.parametrize("name", FLOWS)
def test_flows(name):
    found, flow = FLOWS[name]
    assert found.flows == (() if flow is None else (flow,))


def test_split_vocabulary_and_tokens():
    lookup, gradient = embedding(), scatter("scatter-add", *EMBED)

    def split(one, letter, stride):
        name = one.factors[letter].name
        return [str(x) for side in layouts(one, Choice.of({name: [Split("t", stride)]}))
                for x in side]  # fmt: skip

    assert split(lookup, 0, 4) == ["[t/4,-]", "[-,-,-]", "[-,-,-]+sum(t)"]
    assert split(gradient, 0, 4) == ["[t/4,-]", "[-,-,-]", "[-,-,-]", "[t/4,-]"]
    # The operand is added once, so it is wanted as a term.
    assert split(gradient, 2, 1) == [
        "[-,-]+sum(t)", "[t/1,-,-]", "[t/1,-,-]", "[-,-]+sum(t)"
    ]  # fmt: skip
