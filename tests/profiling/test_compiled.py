"""Prices read off compiled programs."""

from __future__ import annotations

import pytest

from rhino_jax.errors import ClusterError, VerifyError
from rhino_jax.profiling.compiled import clock_of, kernel_seconds, one_device, priced
from rhino_jax.profiling.grid import elementwise, product
from rhino_jax.profiling.make import compiled_profile
from rhino_jax.verify.compile_only import installed
from rhino_jax.verify.targets import parse_target

COSTS = (
    '"reification_cost":[{"exec_time_us":9,"name":""},'
    '{"exec_time_us":4.5,"name":"sol"}]'
)
CONFIG = f"backend_config={{{COSTS}}}"
LOOP = f"""HloModule m, num_partitions=1

%body {{
  %p = (s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %x = f32[8] get-tuple-element(%p), index=1
  %y = f32[8] fusion(%x), kind=kLoop, calls=%f, metadata={{op_name="a/b"}}, {CONFIG}
  ROOT %t = (s32[], f32[8]) tuple(%next, %y)
}}

%cond {{
  %p = (s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(3)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}}

%f {{
  ROOT %p = f32[8] parameter(0)
}}

ENTRY %main {{
  %x = f32[8] parameter(0)
  %zero = s32[] constant(0)
  %t = (s32[], f32[8]) tuple(%zero, %x)
  %w = (s32[], f32[8]) while(%t), condition=%cond, body=%body
  %s = f32[8] all-reduce-start(%x), metadata={{op_name="c"}}, {CONFIG}
  ROOT %d = f32[8] all-reduce-done(%s), {CONFIG}
}}
"""


def test_loops_count_as_often_as_they_run_and_pairs_once() -> None:
    fused, reduced = priced(LOOP)
    assert (fused.opcode, fused.scope, fused.is_collective) == ("fusion", "a/b", False)
    assert fused.seconds == pytest.approx(3 * 4.5e-6)
    assert reduced.is_collective and reduced.seconds == pytest.approx(4.5e-6)


def test_cycles_of_a_tpu() -> None:
    text = LOOP.replace(COSTS, '"window_config":{"estimated_cycles":"3000"}')
    fused, *_ = priced(text, 1.5e9)
    assert fused.seconds == pytest.approx(3 * 2e-6)


def test_targets_and_what_has_no_prices() -> None:
    assert one_device("v5p").text == "v5p:1x1x1"
    assert clock_of(parse_target("h100:1x8")) == 0.0
    with pytest.raises(VerifyError, match="no compiler prices kernels of v4"):
        clock_of(one_device("v4"))
    with pytest.raises(ClusterError, match="did you mean h100"):
        compiled_profile("h10")


@pytest.mark.compilers
@pytest.mark.skipif(not installed("cuda"), reason="needs the GPU compiler")
def test_the_gpu_compiler_prices_products_and_fusions() -> None:
    large, small, copy = (
        product(4096, 4096, 4096, "bfloat16"),
        product(256, 256, 256, "bfloat16"),
        elementwise("copy", lambda x: x + 1, (2**22,), "float32"),
    )
    found = kernel_seconds((large, small, copy), "h100", None)
    assert all(seconds is not None for seconds in found)
    a, b, c = (seconds or 0.0 for seconds in found)
    assert 0.5 < large.flops / a / 989.5e12 < 1 and b < a / 10
    assert 0.5 < copy.num_bytes / c / 3.35e12 <= 1.1
