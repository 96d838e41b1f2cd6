"""What stands at a compiled program's peak, and the compiler's time: by hand."""

from __future__ import annotations

import pytest

from rhino_jax.verify.hlo_memory import array_bytes, busiest
from rhino_jax.verify.hlo_time import CompilerTime, compiler_time

KB = 1024  # bytes of f32[256]

STRAIGHT = """HloModule m, is_scheduled=true

ENTRY %main (p: f32[256]) -> f32[256] {
  %p = f32[256]{0} parameter(0)
  %a = f32[256]{0} custom-call(%p), metadata={op_name="jit(f)/first"}
  %b = f32[512]{0} custom-call(%a)
  %both = (f32[512]{0}, f32[256]{0}) custom-call(%b, %a)
  %left = f32[512]{0} get-tuple-element(%both), index=0
  %c = f32[256]{0} custom-call(%left)
  ROOT %d = f32[256]{0} custom-call(%c)
}
"""

LOOP = """HloModule m, is_scheduled=true

%body (s: (s32[], f32[256])) -> (s32[], f32[256]) {
  %s = (s32[], f32[256]{0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[256]{0} get-tuple-element(%s), index=1
  %wide = f32[1024]{0} custom-call(%x), backend_config={"reification_cost":[\
{"exec_time_us":9.0,"name":""},{"exec_time_us":2.0,"name":"sol"}]}
  %y = f32[256]{0} custom-call(%wide)
  ROOT %t = (s32[], f32[256]{0}) tuple(%i, %y)
}

%condition (s: (s32[], f32[256])) -> pred[] {
  %s.1 = (s32[], f32[256]{0}) parameter(0)
  ROOT %r = pred[] custom-call(%s.1)
}

ENTRY %main (p: f32[256]) -> f32[256] {
  %p = f32[256]{0} parameter(0)
  %zero = s32[] constant(0)
  %kept = f32[256]{0} custom-call(%p)
  %start = f32[256]{0} custom-call(%p)
  %in = (s32[], f32[256]{0}) tuple(%zero, %start)
  %w = (s32[], f32[256]{0}) while(%in), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"5"}}
  %out = f32[256]{0} get-tuple-element(%w), index=1
  %sum = f32[256]{0} all-reduce(%out), replica_groups={}, to_apply=%condition, \
backend_config={"reification_cost":[{"exec_time_us":3.5,"name":"sol"}]}
  ROOT %d = f32[256]{0} custom-call(%sum, %kept)
}
"""


PAIR = """HloModule m, is_scheduled=true

%wide (x: f32[256]) -> f32[256] {
  %x = f32[256]{0} parameter(0)
  ROOT %y = f32[256]{0} exponential(%x)
}

ENTRY %main (p: f32[256]) -> f32[8] {
  %p = f32[256]{0} parameter(0)
  PRODUCT
  %wider = f32[256]{0} fusion(%made), kind=kLoop, calls=%wide
  ROOT %end = f32[8]{0} custom-call(%wider)
}
"""
ALONE = "%made = f32[256]{0} fusion(%p), kind=kLoop, calls=%wide"
SCRATCH = """%both = (f32[256]{0}, s8[4]{0}) custom-call(%p)
  %made = f32[256]{0} get-tuple-element(%both), index=0"""
ADDED = f"""{SCRATCH.replace("made", "first")}
  %more = (f32[256]{{0}}, s8[4]{{0}}) custom-call(%p, %p, %first), \
output_to_operand_aliasing={{{{0}}: (2, {{}})}}
  %made = f32[256]{{0}} get-tuple-element(%more), index=0"""


@pytest.mark.parametrize(
    ("product", "temp_bytes"), [(ALONE, KB + 32), (SCRATCH, 2 * KB), (ADDED, 2 * KB)]
)
def test_what_stands_beside_scratch_is_not_written_over(
    product: str, temp_bytes: int
) -> None:
    assert busiest(PAIR.replace("PRODUCT", product)).temp_bytes == temp_bytes


def test_what_stands_side_by_side() -> None:
    found = busiest(STRAIGHT)
    # a (1), b (2) and both results (2 + 1), while they are made.
    assert (found.temp_bytes, found.during) == (6 * KB, "both")
    assert [(x.name, x.num_bytes // KB) for x in found.standing] == [
        ("b", 2),
        ("both", 2),
        ("a", 1),
        ("both", 1),
    ]
    assert found.standing[2].op == "jit(f)/first"
    assert found.standing[2].shape == "f32[256]"


def test_an_output_in_an_argument_s_memory_costs_nothing() -> None:
    plain = """HloModule m, is_scheduled=true

ENTRY %main (p: f32[256]) -> f32[256] {
  %p = f32[256]{0} parameter(0)
  ROOT %d = f32[256]{0} custom-call(%p)
}
"""
    aliased = plain.replace("m, ", "m, input_output_alias={ {}: (0, {}, may-alias) }, ")
    assert busiest(plain).temp_bytes == KB
    assert busiest(aliased).temp_bytes == 0


def test_a_body_stands_beside_its_loop() -> None:
    found = busiest(LOOP)
    # kept and start (the carry) outside; inside the wide one, its result in the carry.
    assert found.temp_bytes == 6 * KB
    assert {x.name for x in found.standing} == {"kept", "start", "wide"}


def test_on_chip_memory_and_tiles() -> None:
    on_chip = STRAIGHT.replace("%b = f32[512]{0}", "%b = f32[512]{0:T(512)S(1)}")
    assert busiest(on_chip, frozenset({1})).temp_bytes == 4 * KB
    assert array_bytes("bf16[16,32,1024,1000]{3,2,1,0:T(8,128)(2,1)}") == [2**30]
    assert array_bytes("(pred[3]{0:T(256)(128)(4,1)}, token[])") == [256, 0]


def test_the_compiler_s_time_counts_loops_and_the_newest_model() -> None:
    assert compiler_time(LOOP) == CompilerTime(
        kernel_seconds=pytest.approx(10e-6), collective_seconds=pytest.approx(3.5e-6)
    )
    cycles = STRAIGHT.replace(
        "custom-call(%c)", 'custom-call(%c), backend_config={"estimated_cycles":"1500"}'
    )
    found = compiler_time(cycles)
    assert found.cycles == 1500
    assert found.seconds("v5e") == pytest.approx(1e-6)
    assert found.seconds("v2") is None
