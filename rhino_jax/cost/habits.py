"""What compilers do beside the plan, by platform, as observed in what they make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rhino_jax.cost.tiles import Size, flat_bytes, tiled_bytes

MIB = 2**20
DEAR = frozenset("tanh erf erfc erf_inv pow".split())
"""``exp`` is not among them (a softmax is one kernel), nor is ``logistic``: it is made
of one."""


@dataclass(frozen=True)
class Habits:
    """What a compiler does with memory beside the plan.

    Attributes:
        workspace_bytes: scratch memory of a library's matrix product while it runs.
        combine_bytes: collectives are combined up to this size; 0 is never.
        late_products: a product that is only added runs where it is added.
        stores_last: a product that a loop's body only stores runs at its end.
        peels: the first turn of a loop that stores what it reduces over devices runs
            ahead of it (XLA's collective pipeliner), and the part of that turn that
            does not wait for the carry as early as it can.
        products_fuse: what a product or convolution reads is made while it runs.
        remade: what this many products of two matrices read, and nothing else, each
            makes for itself, however much it reads for that.
        joins: a kernel that makes something dear on its way, which a product reads,
            writes that too.
        hosts: what works element by element on a product's result is written by the
            product's own kernel (:mod:`rhino_jax.cost.guests`).
        looks_up: a look-up is a kernel of its own: what it reads is written.
        selects: a scatter of at most one element to each row is made as it is read, by
            comparing positions.
        dear: kinds of ops that are written rather than made twice.
        scatters_windows: the gradient of a max pooling is a scatter to the places of
            the maxima, which stand as 32-bit indices.
        hides_literals: a literal behind a barrier is not known any more.
        sums_beside: a sum over what a kernel writes is made in that kernel, which then
            writes over nothing that it reads.
        tries_first: of what a kernel reads the first of a result's size is tried to be
            written over, and given up where it is read again; else one that is not.
        adds_whole: what is added to a product is written whole, broadcasts too.
        recomputes: where more stands than the second share of what inputs and outputs
            leave of the first share of the device's memory, the compiler recomputes;
            () is never.
        repeats_products: it repeats products of two matrices and convolutions, too.
        size: bytes of an array, given its shape and dtype.
        sends_beside: a shard that is handed on travels while a product works.
        tables_ahead: in a loop over microbatches look-ups are kernels of their own, and
            tables whose rows are only converted to a narrower type are converted ahead
            of the loop, whole or before they are gathered.
        lane_bytes: what an element takes at least in a kernel that is no product.
        rearranges: what a collective cuts or puts together along a dimension that is
            not the first is copied for it; other compilers choose an order of the
            dimensions in which it need not be.
    """

    workspace_bytes: int = 0
    combine_bytes: int = 0
    late_products: bool = False
    stores_last: bool = False
    peels: bool = False
    products_fuse: bool = False
    remade: int = 0
    joins: bool = False
    hosts: bool = False
    looks_up: bool = False
    selects: bool = False
    dear: frozenset[str] = DEAR
    scatters_windows: bool = False
    hides_literals: bool = False
    sums_beside: bool = False
    tries_first: bool = False
    adds_whole: bool = False
    recomputes: tuple[float, ...] = ()
    repeats_products: bool = False
    size: Size = flat_bytes
    lane_bytes: int = 0
    sends_beside: bool = False
    tables_ahead: bool = False
    rearranges: bool = False

    def temporaries_bytes(self, device_bytes: int, fixed_bytes: int) -> int | None:
        """The most that may stand beside inputs and outputs before it recomputes.

        >>> HABITS["cuda"].temporaries_bytes(100, 20)
        57
        """
        if not self.recomputes:
            return None
        device, rest = self.recomputes
        return int(rest * (device * device_bytes - fixed_bytes))


PLAIN = Habits()
# cuBLAS on Hopper asks for 32 MiB (XLA's s8[33554432]); the thresholds are the
# defaults of xla_gpu_*_combine_threshold_bytes; 80 % stands in GetSchedulerMemoryLimit,
# 95 % is the default of xla_gpu_memory_limit_slop_factor.
_GPU = Habits(
    *(32 * MIB, 30 * MIB),
    late_products=True,
    stores_last=True,
    peels=True,
    scatters_windows=True,
    hides_literals=True,
    sums_beside=True,
    tries_first=True,
    adds_whole=True,
    recomputes=(0.80, 0.95),
)
# A TPU's compiler recomputes where a program does not fit the device (seen: 16.5 GiB
# became 15.2 of 15.75).
HABITS: Mapping[str, Habits] = {
    "cuda": _GPU,
    "rocm": _GPU,  # assumed as of CUDA: not observed
    # Nothing is dear beside memory traffic: a gelu is made again in every product.
    "tpu": Habits(
        late_products=True,
        sends_beside=True,
        products_fuse=True,
        remade=2,
        joins=True,
        hosts=True,
        looks_up=True,
        selects=True,
        tables_ahead=True,
        recomputes=(1.0, 1.0),
        repeats_products=True,
        dear=frozenset(),
        size=tiled_bytes,
        lane_bytes=4,
    ),
    "cpu": Habits(rearranges=True),
}
"""By platform."""
