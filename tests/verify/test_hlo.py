"""The HLO reader: golden texts of real compilers, spellings of groups, loop counts."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rhino_jax.verify.collectives import axes_key, collective_axes
from rhino_jax.verify.hlo import (
    HloCollective,
    axes_of,
    normalized,
    read,
    traffic,
    wire_bytes,
)
from rhino_jax.verify.hlo_loops import _turns
from rhino_jax.verify.hlo_text import (
    elements,
    leaves,
    parse_instruction,
    replica_groups,
    source_target_pairs,
)

DATA = Path(__file__).parent / "data"
MESH = {"d": 2, "t": 4}
KIB, MIB = 1024, 1024**2

AG, AR, RS = "all-gather", "all-reduce", "reduce-scatter"
A2A, CP = "all-to-all", "collective-permute"

# (kind, dtype, operand bytes, result bytes, axes, trip count), as programs.py writes
# them and each compiler changes them: the CPU widens bfloat16, the GPU combines, the
# TPU narrows gathered operands of products.
MIXED = [
    (AG, "f32", 512 * KIB, MIB, "d", 1),
    (AR, "f32", 512 * KIB, 512 * KIB, "t", 1),
    (RS, "f32", 512 * KIB, 128 * KIB, "t", 1),
    (CP, "f32", 128 * KIB, 128 * KIB, "d", 1),
]
NESTED = [
    (AG, "f32", 128 * KIB, 256 * KIB, "d", 3),
    (RS, "f32", 128 * KIB, 32 * KIB, "t", 15),
    (AG, "f32", 32 * KIB, 128 * KIB, "t", 15),
    (AR, "f32", 128 * KIB, 128 * KIB, "t", 1),
]
LOSS = (AR, "f32", 4, 4, "d,t", 1)
ZERO_TPU = [
    *[(AG, "bf16", MIB, 2 * MIB, "d", 1)] * 3,
    *[(RS, "f32", 4 * MIB, 2 * MIB, "d", 1)] * 3,
    LOSS,
]
GOLDEN = {
    "cpu_mixed": MIXED,
    "h100_mixed": MIXED,
    "v5e_mixed": [(AG, "bf16", 256 * KIB, 512 * KIB, "d", 1), *MIXED[1:]],
    "cpu_nested": NESTED,
    "h100_nested": NESTED,
    "v5e_nested": [(AG, "bf16", 64 * KIB, 128 * KIB, "d", 3), *NESTED[1:]],
    "cpu_zero": [
        *[(AG, "f32", 2 * MIB, 4 * MIB, "d", 1)] * 3,
        *[(RS, "f32", 4 * MIB, 2 * MIB, "d", 1)] * 3,
        LOSS,
    ],
    "h100_zero": [
        (AG, "f32", 6 * MIB, 12 * MIB, "d", 1),
        (RS, "f32", 12 * MIB, 6 * MIB, "d", 1),
        LOSS,
    ],
    "v5e_zero": ZERO_TPU,
    "tpu7x_zero": ZERO_TPU,
    "v5e_padded": [
        (RS, "f32", 4160 * 2048 * 4, 1040 * 2048 * 4, "t", 1),
        (CP, "f32", 48 * 2048 * 4, 48 * 2048 * 4, "t", 1),
    ],
    "h100_many": [
        (AR, "f32", 256 * KIB, 256 * KIB, "d,t", 1),
        (CP, "bf16+f32", 768 * KIB, 768 * KIB, "t", 1),
        (AR, "bf16", 512 * KIB, 512 * KIB, "d,t", 1),
    ],
    "cpu_exchange": [
        (AG, "f32", 512 * KIB, MIB, "d", 1),
        (A2A, "f32", MIB, MIB, "t", 1),
        (A2A, "f32", MIB, MIB, "d,t", 1),
    ],
    "v5e_exchange": [
        (AG, "bf16", 256 * KIB, 512 * KIB, "d", 1),
        (A2A, "bf16", 512 * KIB, 512 * KIB, "t", 1),
        (A2A, "bf16", 512 * KIB, 512 * KIB, "d,t", 1),
    ],
    "cpu_branches": [
        (AG, "f32", MIB, 4 * MIB, "t", 1),
        (RS, "f32", 4 * MIB, MIB, "t", 1),
        (AR, "f32", MIB, MIB, "t", 1),
    ],
    "cpu_constrained": [
        *[(AG, "f32", 512 * KIB, MIB, "d", 1)] * 2,
        (AR, "f32", 2 * MIB, 2 * MIB, "d", 1),
        (AR, "f32", MIB, MIB, "t", 1),
    ],
    "h100_constrained": [
        (AG, "f32", MIB, 2 * MIB, "d", 1),
        (RS, "f32", 2 * MIB, MIB, "d", 1),
        (AR, "f32", MIB, MIB, "t", 1),
    ],
    "v5e_constrained": [
        *[(AG, "bf16", 256 * KIB, 512 * KIB, "d", 1)] * 2,
        (RS, "f32", 2 * MIB, MIB, "d", 1),
        (AR, "f32", MIB, MIB, "t", 1),
    ],
    "h100_endless": [(AR, "f32", MIB, MIB, "t", 1)],
    "v5e_endless": [(AR, "f32", MIB, MIB, "t", 1)],
}


def golden(name: str) -> tuple[HloCollective, ...]:
    return read((DATA / f"{name}.hlo").read_text())


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_golden(name: str) -> None:
    found = [
        (
            *(one.kind, one.dtype, one.operand_bytes, one.result_bytes),
            *(axes_key(collective_axes(one, MESH)), one.trip_count),
        )
        for one in golden(name)
    ]
    assert sorted(found) == sorted(GOLDEN[name])


def test_every_golden_file_is_tested() -> None:
    assert sorted(GOLDEN) == sorted(file.stem for file in DATA.glob("*.hlo"))


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_sources_are_kept(name: str) -> None:
    # What the GPU's partitioner reassociates has no metadata of its own.
    nameless = {"h100_constrained": 2}
    lines = [one.source for one in golden(name) if not one.part_of]
    assert sum(not one for one in lines) == nameless.get(name, 0), lines
    assert all(one.startswith("programs.py:") for one in lines if one)


def test_loops_of_unknown_length_are_flagged_and_counted_once() -> None:
    for name in ("h100_endless", "v5e_endless"):
        (one,) = golden(name)
        assert (one.trip_known, one.trip_count) == (False, 1)
    assert all(one.trip_known for one in golden("v5e_nested"))


def test_tpu_forms() -> None:
    """A gather in three fusions counts once, at its asynchronous start; a padded fused
    reduce-scatter knows its padding, and the permute that realigns it names it."""
    spread = (DATA / "v5e_constrained.hlo").read_text()
    assert spread.count(" all-gather(") == 4
    assert [one.is_async for one in golden("v5e_constrained")].count(True) == 1
    scatter, permute = golden("v5e_padded")
    assert permute.part_of == scatter.name
    assert scatter.parts[0].size_bytes == 4096 * 2048 * 4
    assert scatter.aligning_bytes == 64 * 2048 * 4 * 3 // 4
    assert permute.aligning_bytes == permute.total_wire_bytes
    offloaded = [one for one in golden("tpu7x_zero") if one.kind != AR]
    assert all(one.is_async for one in offloaded)


def test_branches_are_named() -> None:
    names = {one.kind: one.branches for one in golden("cpu_branches")}
    assert names[AG] == names[RS] != names[AR]
    assert all(len(path) == 1 for path in names.values())


def test_traffic_of_the_nested_loops() -> None:
    """Outer 3, inner 15 turns; the numbers are worked out by hand."""
    gather_d = 256 * KIB // 2 * 3
    over_t = 15 * (128 * KIB * 3 // 4) * 2 + 2 * 128 * KIB * 3 // 4
    for name in ("cpu_nested", "h100_nested"):
        text = (DATA / f"{name}.hlo").read_text()
        assert traffic(text, MESH) == {"d": gather_d, "t": over_t}


SLICES = """HloModule two_slices, num_partitions=4
ENTRY %main () -> () {
  %p = f32[1024]{0} parameter(0)
  %all = token[] after-all()
  %send = (f32[1024]{0}, u32[], token[]) send(%p, %all), channel_id=2, \
is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",\
_xla_megascale_transfer_type="ALL_REDUCE"}
  %send.1 = (f32[1024]{0}, u32[], token[]) send(%p, %all), channel_id=3, \
is_host_transfer=true, frontend_attributes={_xla_megascale_target=\
{{100000->200000},{200000->100000}},_xla_megascale_transfer_type="ONE_TO_ONE"}
  ROOT %send-done = token[] send-done(%send), channel_id=2
}
"""


def test_transfers_between_tpu_slices() -> None:
    reduce, permute = read(SLICES)
    assert (reduce.kind, collective_axes(reduce, MESH)) == (AR, ("d",))
    assert reduce.groups == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert (permute.kind, permute.groups) == (CP, ((0, 4), (4, 0)))
    assert collective_axes(permute, MESH) == ("d",)


WRAPPED = """HloModule wrapped, num_partitions=8, entry_computation_layout={()->()}
%async_computation (a: f32[64]) -> f32[8] {
  %a = f32[64]{0} parameter(0)
  ROOT %rs = f32[8]{0} reduce-scatter(%a), channel_id=1, replica_groups=[1,8]<=[8], \
to_apply=%add, dimensions={0}
}
%helper (b: f32[64]) -> f32[64] {
  %b = f32[64]{0} parameter(0)
  ROOT %ar = f32[64]{0} all-reduce(%b), channel_id=2, replica_groups={}, to_apply=%add
}
ENTRY %main (p: f32[64]) -> f32[64] {
  %p = f32[64]{0} parameter(0)
  %s = ((f32[64]{0}), f32[8]{0}, u32[]) async-start(%p), calls=%async_computation
  %d = f32[8]{0} async-done(%s)
  %local = f32[64]{0} all-reduce(%p), replica_groups={}, to_apply=%add
  ROOT %c = f32[64]{0} call(%p), to_apply=%helper
}
"""


def test_calls_wrappers_and_empty_groups() -> None:
    scatter, local, reduce = read(WRAPPED)
    assert (scatter.kind, scatter.is_async, scatter.result_bytes) == (RS, True, 32)
    assert reduce.groups == (tuple(range(8)),)
    # Without a channel it runs among replicas, and there is only one.
    assert (local.groups, wire_bytes(local)) == (((0,),), 0)
    assert traffic(WRAPPED, {"a": 8}) == {"a": 256 * 7 // 8 + 2 * 256 * 7 // 8}


NAMELESS = """HloModule nameless, num_partitions=2
ENTRY %main () -> () {
  %p = f32[64]{0} parameter(0)
  %dot = (f32[64]{0}, s8[8]{0}) custom-call(%p), \
metadata={op_name="jit(f)/dot_general" source_file="step.py" source_line=7}
  %one = f32[64]{0} get-tuple-element(%dot), index=0
  ROOT %ar = f32[64]{0} all-reduce(%one), channel_id=1, replica_groups={}, to_apply=%a
}
"""


def test_a_nameless_collective_is_near_what_it_takes() -> None:
    assert read(NAMELESS)[0].source == "near step.py:7 (jit(f)/dot_general)"


def test_no_module_is_an_error() -> None:
    with pytest.raises(ValueError, match="no ENTRY computation"):
        read("module @jit_f {}")


@pytest.mark.parametrize(
    ("kind", "operand", "result", "expected"),
    [
        (AG, 100, 400, 300),
        (AR, 400, 400, 600),
        (RS, 400, 100, 300),
        (A2A, 400, 400, 300),
        ("ragged-all-to-all", 400, 400, 300),
    ],
)
def test_wire_bytes(kind: str, operand: int, result: int, expected: int) -> None:
    one = _collective(kind, operand, result, ((0, 1, 2, 3),))
    assert wire_bytes(one) == expected


def test_wire_bytes_of_permutes() -> None:
    assert wire_bytes(_collective(CP, 400, 400, ((0, 1), (1, 0)))) == 400
    assert wire_bytes(_collective(CP, 400, 400, ((0, 0), (1, 1)))) == 0
    assert wire_bytes(_collective(CP, 400, 400, ())) == 0


def _collective(kind: str, operand: int, result: int, groups: object) -> HloCollective:
    fields = {"name": "x", "dtype": "f32", "trip_count": 1, "trip_known": True}
    rest = {"computation": "main", "source": "", "is_async": False, "parts": ()}
    return HloCollective(
        kind=kind,
        operand_bytes=operand,
        result_bytes=result,
        groups=groups,
        **fields,
        **rest,
    )


def test_all_reduce_is_a_scatter_and_a_gather() -> None:
    apart = normalized([(RS, 300), (AG, 300)])
    assert apart == normalized([(AR, 600)])


# ---- text ------------------------------------------------------------------------


def test_combined_types_with_comments() -> None:
    line = (
        "  %ar = (f32[2]{0}, f32[3]{0:T(8,128)S(1)}, /*index=2*/bf16[4,4]{1,0}) "
        'all-reduce(%a, %b, /*index=2*/%c), metadata={op_name="f(x)/psum"}'
    )
    one = parse_instruction(line)
    assert one is not None
    assert one.operands == ("a", "b", "c")
    assert [leaf.size_bytes for leaf in leaves(one.type_text)] == [8, 12, 32]
    assert len(elements(one.type_text)) == 3


@pytest.mark.parametrize(
    ("dtype", "size"),
    [("pred", 6), ("s4", 3), ("f8e4m3fn", 6), ("bf16", 12), ("f64", 48), ("c64", 48)],
)
def test_element_types(dtype: str, size: int) -> None:
    assert leaves(f"{dtype}[2,3]{{1,0}}")[0].size_bytes == size


sizes_lists = st.lists(st.integers(2, 4), min_size=1, max_size=4)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_iota_groups(data: st.DataObject) -> None:
    """Against numpy's reshape and transpose."""
    dims = data.draw(sizes_lists)
    order = data.draw(st.permutations(range(len(dims))))
    total = math.prod(dims)
    size = data.draw(
        st.sampled_from([n for n in range(1, total + 1) if total % n == 0])
    )
    ids = np.arange(total).reshape(dims).transpose(order).reshape(-1, size)
    spelled = f"[{total // size},{size}]<=[{','.join(map(str, dims))}]"
    if list(order) != sorted(order):
        spelled += f"T({','.join(map(str, order))})"
    found = replica_groups(f", replica_groups={spelled}, dimensions={{0}}", total)
    assert found == tuple(map(tuple, ids.tolist()))


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_mesh_groups(data: st.DataObject) -> None:
    """Whole axes and parts of axes, with and without a device order, against numpy."""
    count = data.draw(st.integers(1, 3))
    cuts = [
        data.draw(st.lists(st.integers(2, 3), min_size=1, max_size=3))
        for _ in range(count)
    ]
    axes = [math.prod(cut) for cut in cuts]
    factors = [
        (axis, place) for axis in range(count) for place in range(len(cuts[axis]))
    ]
    if data.draw(st.booleans()):
        chosen = data.draw(st.lists(st.sampled_from(factors), min_size=1, unique=True))
        names = [
            f"'x{axis}':({math.prod(cuts[axis][:place])}){cuts[axis][place]}"
            for axis, place in chosen
        ]
    else:
        whole = data.draw(st.lists(st.integers(0, count - 1), min_size=1, unique=True))
        chosen = [(axis, place) for axis in whole for place in range(len(cuts[axis]))]
        names = [f"'x{axis}'" for axis in whole]
    ids = np.arange(math.prod(axes))
    order = ""
    if data.draw(st.booleans()):
        ids = np.array(data.draw(st.permutations(range(len(ids)))))
        order = f", device_ids=({','.join(map(str, ids))})"
    shaped = ids.reshape([n for cut in cuts for n in cut])
    last = [factors.index(one) for one in chosen]
    rest = [place for place in range(len(factors)) if place not in last]
    size = math.prod(shaped.shape[place] for place in last)
    expected = shaped.transpose([*rest, *last]).reshape(-1, size)
    mesh = ",".join(f"'x{axis}'={size}" for axis, size in enumerate(axes))
    spelled = f"replica_groups=mesh[{mesh}]{order} {{{','.join(names)}}}, channel_id=1"
    assert replica_groups(spelled, 1) == tuple(map(tuple, expected.tolist()))


def test_other_mesh_spellings() -> None:
    old = "replica_groups=@mesh<a=2,b=4>, device_ids=([4,2]T(1,0)) {b:(2)2}"
    ids = np.arange(8).reshape(4, 2).T.reshape(2, 2, 2)
    assert replica_groups(old, 1) == tuple(map(tuple, ids.reshape(-1, 2).tolist()))
    assert replica_groups("replica_groups={{0,1},{2,3}}", 4) == ((0, 1), (2, 3))
    assert replica_groups("replica_groups={}", 3) == ((0, 1, 2),)
    assert replica_groups(", to_apply=%add", 2) == ((0, 1),)
    pairs = ", source_target_pairs={{0,4},{4,0}}, metadata={}"
    assert source_target_pairs(pairs) == ((0, 4), (4, 0))


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_axes_of_products(data: st.DataObject) -> None:
    """Groups over any subset of axes are recognised, in any order of groups and ids."""
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    mesh = {f"x{axis}": size for axis, size in enumerate(sizes)}
    inside = sorted(data.draw(st.sets(st.integers(0, len(sizes) - 1))))
    outside = [axis for axis in range(len(sizes)) if axis not in inside]
    ids = np.arange(math.prod(sizes)).reshape(sizes).transpose([*outside, *inside])
    rows = ids.reshape(-1, math.prod(sizes[axis] for axis in inside)).tolist()
    shuffled = [tuple(data.draw(st.permutations(row))) for row in rows]
    groups = tuple(data.draw(st.permutations(shuffled)))
    expected = tuple(f"x{axis}" for axis in inside if sizes[axis] > 1)
    assert axes_of(groups, mesh) == expected


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_axes_of_anything_against_brute_force(data: st.DataObject) -> None:
    """Random partitions are named only where some subset of axes gives them."""
    mesh = {"a": 2, "b": 2, "c": 2}
    ids = data.draw(st.permutations(range(8)))
    size = data.draw(st.sampled_from([1, 2, 4, 8]))
    groups = tuple(tuple(ids[n : n + size]) for n in range(0, 8, size))
    as_sets = {frozenset(group) for group in groups}
    matching = [
        axes
        for count in range(4)
        for axes in itertools.combinations(mesh, count)
        if as_sets == _product_groups(axes, mesh)
    ]
    assert axes_of(groups, mesh) == (matching[0] if matching else ("unknown",))


def _product_groups(axes: tuple[str, ...], mesh: dict[str, int]) -> set[frozenset[int]]:
    ids = np.arange(8).reshape(2, 2, 2)
    inside = [list(mesh).index(name) for name in axes]
    outside = [axis for axis in range(3) if axis not in inside]
    rows = ids.transpose([*outside, *inside]).reshape(-1, 2 ** len(inside))
    return {frozenset(row) for row in rows.tolist()}


def test_axes_of_strangers() -> None:
    assert axes_of(((0, 9),), MESH) == ("unknown",)
    assert axes_of(((0, 1), (2, 3), (4, 5), (6, 7)), MESH) == ("unknown",)
    assert axes_of(((0, 3), (3, 0), (4, 4)), MESH, pairs=True) == ("t",)
    assert axes_of(((0, 5),), MESH, pairs=True) == ("d", "t")


@settings(max_examples=200, deadline=None)
@given(
    st.integers(-9, 9),
    st.integers(-3, 3),
    st.sampled_from(["LT", "LE", "GT", "GE", "NE"]),
)
def test_turns_against_running_the_loop(gap: int, growth: int, direction: str) -> None:
    holds = {
        "LT": lambda n: n < 0,
        "LE": lambda n: n <= 0,
        "GT": lambda n: n > 0,
        "GE": lambda n: n >= 0,
        "NE": lambda n: n != 0,
    }[direction]
    turns, value = 0, gap
    while holds(value) and turns < 100:
        turns, value = turns + 1, value + growth
    assert _turns(gap, growth, direction) == (turns if turns < 100 else None)
