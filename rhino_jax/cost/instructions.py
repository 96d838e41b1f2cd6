"""What one device carries out: buffers, and instructions that read and write them.

And which of these instructions compilers make part of others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from rhino_jax.ir.assignment import OpPlan
from rhino_jax.ir.factors import PARALLEL, POSITIONAL, REDUCTION, Rule
from rhino_jax.ir.program import Op, Program, Where
from rhino_jax.ir.steps import ALL_REDUCE, EMBED, MASK, SLICE, Step

RuleOf = Callable[[Program, Op], Rule]

FUSED, REDUCING, OPAQUE = "fused", "reducing", "opaque"
"""Roles. Compilers make a *fused* instruction part of those that read it; a *reducing*
one swallows what it reads but writes its result; an *opaque* one reads and writes."""

RENAMING = frozenset(("reshape", "squeeze", "transpose", "expand_dims", "copy_p"))
RESIZING = frozenset(("broadcast_in_dim", "reduce_sum", "reduce_max", "reduce_min"))
"""These rename too where they neither add nor drop anything but dimensions of 1."""
ADDS = frozenset(("add", "add_any"))
CONVERT = "convert_element_type"
CONVERTS = frozenset((CONVERT,))
BARRIER = "optimization_barrier"
REMATERIALIZE = "rematerialize"
STORE, TAKE = "store", "take"
"""A body's slice written to a stacked output, and read from a stacked input."""
NARROW = "narrow"
"""A table's shard converted before it is gathered (see ``cost/simplify.py``)."""
ACCUMULATE = "accumulate"
"""The loop over microbatches; its body's ops are ops of the Program itself."""

PRODUCTS = frozenset(("dot_general", "conv_general_dilated", "ragged_dot"))

PLACES, ZEROS = "places_of_maxima", "zeros"
"""Where in its window each maximum of a pooling stands; and what its gradient is
scattered into (see ``cost/simplify.py``), or an accumulator begins with."""

ROLES: Mapping[str, str] = {
    **dict.fromkeys((SLICE, MASK, EMBED, STORE, TAKE), FUSED),
    **dict.fromkeys(
        "slice pad concatenate rev tile stack unstack split gather dynamic_slice "
        "select_n iota broadcast_in_dim".split(),
        FUSED,
    ),
    **dict.fromkeys(("argmax", "argmin", "reduce_prod", "reduce"), REDUCING),
    # Elementwise by their rules, but drawn by kernels of their own.
    **dict.fromkeys(
        "random_bits random_split random_seed random_fold_in threefry2x32 "
        "rng_bit_generator rng_uniform".split(),
        OPAQUE,
    ),
    **dict.fromkeys(PRODUCTS, OPAQUE),
}
PARTIAL_READERS = frozenset(
    (SLICE, TAKE, "slice", "gather", "dynamic_slice", "split", "unstack")
)
"""These read no more of an operand than they make."""

OVERWRITES = frozenset((ALL_REDUCE,))
"""Steps that may be done in place; of ops those that :func:`updates` tells."""


@dataclass(frozen=True)
class Buffer:
    """One version of a value on one device; ``item_bytes`` of an element."""

    value: int
    num_bytes: int
    name: str = ""
    item_bytes: float = 4.0

    @property
    def num_elements(self) -> float:
        """With those of pads."""
        return self.num_bytes / self.item_bytes


@dataclass(frozen=True)
class Instruction:
    """One op on its shard, or one step of a move.

    ``reads`` and ``writes`` are numbers of buffers. ``bodies`` run ``trips`` times;
    of several (branches) one. ``overwrites`` are pairs (read, written) that may be one
    memory if what is read is not needed afterwards. ``extended_bytes`` are those of
    operands that are copied first, to lie beside their halos.
    """

    kind: str
    role: str
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    program: Program
    index: int
    op: Op | None = None
    plan: OpPlan = field(default=OpPlan(), repr=False)
    rule: Rule | None = field(default=None, repr=False)
    step: Step | None = None
    bodies: tuple[Unfolded, ...] = field(default=(), repr=False)
    trips: int = 1
    overwrites: tuple[tuple[int, int], ...] = ()
    extended_bytes: int = 0
    within: int | None = None
    """Of a step that the product beside it does (see
    :class:`~rhino_jax.ir.steps.Move`): the value that it moves."""
    known: bool = True
    """Whether the compiler knows a literal that is read: no barrier hides it."""

    @property
    def where(self) -> Where:
        return self.op.where if self.op else Where()

    @property
    def constant(self) -> complex | None:
        """What is broadcast, if this is the broadcast of a literal that is known."""
        if self.kind != "broadcast_in_dim" or self.op is None or self.step is not None:
            return None
        return self.program.values[self.op.operands[0]].literal if self.known else None


@dataclass(frozen=True)
class Unfolded:
    """Buffers and instructions of one Program, its inputs' and outputs' buffers.

    ``same``: pairs (input, output) of positions that are one memory, one after the
    other: a loop's carries, donated inputs.
    """

    buffers: tuple[Buffer, ...]
    instructions: tuple[Instruction, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    same: tuple[tuple[int, int], ...] = ()
    pinned: tuple[int, ...] = ()
    """Buffers that a barrier reads: they are written, whatever reads them."""

    @cached_property
    def readers(self) -> tuple[tuple[int, ...], ...]:
        """Buffer -> the instructions that read it."""
        found: list[list[int]] = [[] for _ in self.buffers]
        for index, instruction in enumerate(self.instructions):
            for buffer in dict.fromkeys(instruction.reads):
                found[buffer].append(index)
        return tuple(map(tuple, found))

    def only_reader(self, buffer: int) -> int | None:
        """The one instruction that reads a buffer; None where several do, or none."""
        readers = self.readers[buffer]
        return readers[0] if len(readers) == 1 else None

    @cached_property
    def writer(self) -> tuple[int, ...]:
        """Buffer -> the instruction that writes it; -1 for inputs and constants."""
        found = [-1] * len(self.buffers)
        for index, instruction in enumerate(self.instructions):
            for buffer in instruction.writes:
                found[buffer] = index
        return tuple(found)


def updates(kind: str) -> bool:
    """Whether an op changes part of its first operand and leaves the rest."""
    return kind == "dynamic_update_slice" or kind.startswith("scatter")


def multiplies_one(one: Instruction) -> bool:
    """A product of one matrix with another, or a convolution."""
    if one.kind != "dot_general" or one.op is None:
        return one.kind in PRODUCTS
    _, (batched, _) = one.op.param["dimension_numbers"]
    return not batched


def role_of(op: Op, rule: Rule) -> str:
    """Whether compilers fuse ``op``: by the table, else by what its rule says.

    An op without reductions whose operands' factors all stand in its results works
    element by element.
    """
    known = ROLES.get(op.kind)
    if known:
        return known
    kinds = {factor.kind for factor in rule.factors}
    if op.kind.startswith("reduce_") and not op.kind.startswith("reduce_window"):
        return FUSED if op.kind == "reduce_precision" else REDUCING
    if kinds <= {PARALLEL, POSITIONAL} and len(rule.results) == 1:
        made = {name for dim in rule.results[0] for name in dim}
        read = {name for dims in rule.operands for dim in dims for name in dim}
        return FUSED if read <= made else OPAQUE
    return REDUCING if kinds == {REDUCTION} else OPAQUE


def with_stores(
    instructions: list[Instruction], stacked: tuple[int, ...], program: Program
) -> tuple[Instruction, ...]:
    """Each stacked output is written to its place as soon as it is there."""
    waiting = set(stacked)
    result: list[Instruction] = []
    made = {w for instruction in instructions for w in instruction.writes}
    for buffer in sorted(waiting - made):
        result.append(Instruction(STORE, FUSED, (buffer,), (), program, 0))
    for instruction in instructions:
        result.append(instruction)
        for buffer in instruction.writes:
            if buffer in waiting:
                place = instruction.index
                store = Instruction(STORE, FUSED, (buffer,), (), program, place)
                result.append(store)
    return tuple(result)


def renames(program: Program, op: Op) -> bool:
    """Whether the result is the first operand's memory under another shape."""
    if op.kind in RENAMING:
        return True
    if op.kind not in RESIZING or not program.values[op.operands[0]].shape:
        return False
    (read, *_), (made,) = program.operand_values(op), program.result_values(op)
    return read.size == made.size


def carries(op: Op, number: int) -> tuple[tuple[int, int], ...]:
    """Positions (input, output) of the carries of body ``number`` of ``op``."""
    if op.kind == "scan":
        first, count = op.param["num_consts"], op.param["num_carry"]
    elif op.kind == "while" and number == 1:
        first, count = op.param["body_nconsts"], len(op.results)
    else:
        return ()
    return tuple((first + i, i) for i in range(count))


def overwrites(
    op: Op, reads: tuple[int, ...], writes: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    """Pairs of what an op reads and writes that share memory, where it may."""
    if op.kind == "scan":
        first, count = op.param["num_consts"], op.param["num_carry"]
    elif op.kind == "while":
        first = op.param["cond_nconsts"] + op.param["body_nconsts"]
        count = len(writes)
    elif updates(op.kind):
        first, count = 0, 1
    else:
        return ()
    return tuple(zip(reads[first : first + count], writes[:count], strict=True))
