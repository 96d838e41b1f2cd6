"""A TPU compiler's buffer assignment, read off its log."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from benchmarks.assigned import COMMAND, assigned
from rhino_jax.verify.compile_only import compile_for

LOG = """\
I1 7 heap_simulator.cc:404] Start buffer: <3 of.another.simulation @0>
I1 7 buffer_assignment.cc:2567] Assigning buffers to module jit_step
I1 7 heap_simulator.cc:400] Time step: 1
I1 7 heap_simulator.cc:404] Start buffer: <5 dot @0>
I1 7 heap_simulator.cc:400] Time step: 2
I1 7 heap_simulator.cc:404] Start buffer: <6 while{1} (phi) @0>
I1 7 heap_simulator.cc:400] Time step: 3
I1 7 heap_simulator.cc:404] Start buffer: <7 psum @0>
I1 7 heap_simulator.cc:476] Sharing <7 psum @0> with <5 dot @0>, size:64
I1 7 heap_simulator.cc:495] Free Buffer:
I1 7 heap_simulator.cc:498]   <6 while{1} (phi) @0>
I1 7 heap_simulator.cc:400] Time step: 4
I1 7 heap_simulator.cc:404] Start buffer: <8 late @0>
I1 7 heap_simulator.cc:495] Free Buffer:
I1 7 heap_simulator.cc:498]   <7 psum @0>
I1 7 heap_simulator.cc:498]   <8 late @0>
I1 7 buffer_assignment.cc:2537] allocation 9: size 160, preallocated-temp:
I1 7 buffer_assignment.cc:2537]  value: <5 dot @0> (size=64,offset=0): f32[16]{0}
I1 7 buffer_assignment.cc:2537]  value: <6 while{1} (phi) @0> (size=32,offset=64): f32
I1 7 buffer_assignment.cc:2537]  value: <7 psum @0> (size=64,offset=0): f32[16]{0}
I1 7 buffer_assignment.cc:2537]  value: <8 late @0> (size=16,offset=144): f32[4]{0}
I1 7 buffer_assignment.cc:2537] allocation 10: size 4, color 2, preallocated-temp:
I1 7 buffer_assignment.cc:2537]  value: <9 flag @2> (size=4,offset=0): u32[]
I1 7 buffer_assignment.cc:2664] allocation 0: size 100, parameter 0, maybe-live-out:
I1 7 buffer_assignment.cc:2664] allocation 1: size 40, parameter 1, shape |f32[10]|:
I1 7 buffer_assignment.cc:2664] allocation 2: size 8, output shape is |f32[2]|, \
maybe-live-out:
"""


def test_what_a_log_says() -> None:
    found = assigned(LOG.splitlines())
    assert (found.argument_bytes, found.output_bytes, found.alias_bytes) == (
        *(140, 108),
        100,
    )
    assert found.temp_bytes == 160
    assert found.peak_bytes == 148 + 64 + 32  # until the loop's value is let go


@pytest.mark.compilers
def test_it_is_what_a_whole_compile_says(tmp_path: Path) -> None:
    def step(x: jax.Array, w: jax.Array) -> jax.Array:
        y = jnp.tanh(x @ w)
        return jnp.sum(jnp.tanh(y @ w) * y)

    shapes = [jax.ShapeDtypeStruct((n, 256), jnp.float32) for n in (2**16, 256)]
    lowered = jax.jit(step).trace(*shapes).lower(lowering_platforms=("tpu",))
    whole = compile_for(lowered, "v5e:1x1")
    quick = compile_for(lowered, "v5e:1x1", command=COMMAND, cache_dir=tmp_path)
    assert whole.memory and quick.memory
    assert quick.memory.argument_bytes == whole.memory.argument_bytes
    on_chip = 256 * 256 * 4  # the whole compile's peak counts `w` there too
    assert 0 <= whole.memory.peak_bytes - quick.memory.peak_bytes <= on_chip
    assert quick.hlo.count(" fusion(") == whole.hlo.count(" fusion(")
