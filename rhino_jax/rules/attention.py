"""Attention as one op: ``softmax(scale q k + bias) v``, and its gradient.

The kernels of ``jax.nn.dot_product_attention(implementation="cudnn")``. With queries
``q`` [b, t, hg, d], keys ``k`` and values ``v`` [b, u, h, d] (``g`` query heads share
one of ``h`` key heads) the result [b, t, hg, e] and the logarithm of the sum of
exponentials [b, hg, t] are split along

- examples ``b`` and heads ``h``, everything on its own. Moving from a split sequence to
  split heads is an all-to-all: DeepSpeed-Ulysses (Jacobs et al., 2023);
- query heads ``g`` of one key head: keys and values whole, their gradients terms;
- the sequence ``s``, where queries and keys are equally many and nothing but their
  positions hides keys: a ring. Every device hands its keys and values on until all have
  met all queries; parts of the softmax are put together by the sums of exponentials
  (Liu, Zaharia and Abbeel, "Ring Attention with Blockwise Transformers", 2023). In the
  backward pass the gradients of keys and values travel with them;
- else queries ``t`` (every device sees all keys: gather them), and in the backward pass
  keys ``u`` too.

What a kernel with dropout, packed sequences or pages does, no shard can do: it is run
whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rhino_jax.ir.factors import (
    BLOCKED,
    PARALLEL,
    POSITIONAL,
    REDUCTION,
    RING,
    Dims,
    Factor,
    Rule,
)
from rhino_jax.ir.program import Op, Value
from rhino_jax.rules.notation import RuleFn, names, plain, whole

FORWARD = "dot_product_attention_fwd_wrapper"
BACKWARD = "dot_product_attention_bwd_wrapper"

QUERY, KEY, VALUE, BIAS, QUERY_LENGTHS, KEY_LENGTHS = range(6)
UNUSED = range(6, 10)
SUMS, RESULT, COTANGENT = 10, 11, 12
"""Operands: the first ten of both, the others of the backward pass."""

EXAMPLES, HEADS, GROUP = "b", "h", "g"
SEQUENCE, QUERIES, KEYS = "s", "t", "u"
DEPTH, WIDTH = "d", "e"

VENDOR = "vendor"
"""The parameter of an op that was recognized: whether cuDNN's kernels take its arrays.
What a user asked them for they do: JAX has seen to it."""

MASKS = ("NO_MASK", "PADDING", "CAUSAL", "PADDING_CAUSAL")


@dataclass(frozen=True)
class Attention:
    """What the parameters of an attention op say.

    ``heads_first``: arrays are [b, heads, sequence, depth], else [b, sequence, heads,
    depth]. ``window``: how many keys, its own position included, a query sees back;
    None for all. ``padded``: operands say how long each example is. ``plain``: neither
    dropout nor a mask of another kind.
    """

    backward: bool
    scale: float
    heads_first: bool
    causal: bool
    padded: bool
    window: int | None
    bias: bool
    bias_gradient: bool
    plain: bool

    @staticmethod
    def of(op: Op) -> Attention:
        param = op.param
        mask, window = param["mask_type"], param["sliding_window_length"]
        bias, bias_gradient = param["variadic_args"]
        return Attention(
            op.kind == BACKWARD,
            param["scale"],
            param["layout"] == 1,
            "CAUSAL" in mask,
            "PADDING" in mask,
            window,
            bias,
            bias_gradient,
            mask in MASKS and not param["dropout_rate"],
        )

    @property
    def sequence_dim(self) -> int:
        return 2 if self.heads_first else 1

    @property
    def heads_dim(self) -> int:
        return 1 if self.heads_first else 2

    def arranged(self, sequence: str, heads: tuple[str, ...], depth: str) -> Dims:
        """The dimensions of queries, keys, values or what is like them."""
        middle = [(sequence,), heads]
        if self.heads_first:
            middle.reverse()
        return ((EXAMPLES,), *middle, (depth,))


VENDOR_DTYPES = ("bfloat16", "float16")
VENDOR_DEPTH = 128
"""The most that cuDNN's kernels take on every GPU that has them."""


def by_vendor(op: Op) -> bool:
    """Whether cuDNN's kernels do it, where there are any."""
    return bool(op.param.get(VENDOR, True))


def vendor_takes(arrays: Sequence[Value]) -> bool:
    """Whether cuDNN's kernels take queries, keys, values and what is like them."""
    dtypes, depths = {v.dtype for v in arrays}, {v.shape[-1] for v in arrays}
    alike = len(dtypes) == len(depths) == 1 and dtypes <= {*VENDOR_DTYPES}
    return alike and all(n <= VENDOR_DEPTH and n % 8 == 0 for n in depths)


def is_ring(about: Attention, query: Value, key: Value) -> bool:
    """Whether the sequence can be split for queries and keys at once."""
    dim = about.sequence_dim
    hidden = about.padded or about.bias
    return query.shape[dim] == key.shape[dim] and not hidden


def shardable(op: Op, reads: Sequence[Value]) -> bool:
    """Whether a shard can tell what it would be in the whole."""
    return Attention.of(op).plain and not any(reads[i].size for i in UNUSED)


def attention(op: Op, reads: Sequence[Value], makes: Sequence[Value]) -> Rule:
    """Forward and backward; see the module's docstring."""
    about = Attention.of(op)
    query, key, value, bias = reads[: BIAS + 1]
    if not shardable(op, reads):
        return whole(reads, makes)
    ring = is_ring(about, query, key)
    rows, columns = (SEQUENCE, SEQUENCE) if ring else (QUERIES, KEYS)
    heads = key.shape[about.heads_dim]
    group = query.shape[about.heads_dim] // heads
    both = (HEADS, GROUP) if group > 1 else (HEADS,)
    queries = about.arranged(rows, both, DEPTH)
    keys = about.arranged(columns, (HEADS,), DEPTH)
    values = about.arranged(columns, (HEADS,), WIDTH)
    out = about.arranged(rows, both, WIDTH)
    sums: Dims = ((EXAMPLES,), both, (rows,))
    biases = _bias(bias, both, rows, columns) if about.bias else None
    shared = {n for n in (EXAMPLES, *both) if biases and n not in _named(biases)}
    back = about.backward
    factors = [
        _summed(EXAMPLES, query.shape[0], PARALLEL, back and EXAMPLES in shared),
        _summed(HEADS, heads, PARALLEL, back and HEADS in shared),
        _summed(GROUP, group, REDUCTION if back else PARALLEL, back),
        Factor(DEPTH, query.shape[-1], BLOCKED),
        Factor(WIDTH, value.shape[-1], BLOCKED),
    ]
    length, width = query.shape[about.sequence_dim], key.shape[about.sequence_dim]
    if ring:
        home = (1, 2) if back else ()
        factors.append(
            Factor(SEQUENCE, length, RING, handed=(KEY, VALUE), returned=home)
        )
    else:
        # A padded key would be seen.
        queries_of = _summed(QUERIES, length, POSITIONAL, back)
        keys_of = _summed(KEYS, width, POSITIONAL if back else BLOCKED, back)
        factors += [replace(f, even=True) for f in (queries_of, keys_of)]
    rest = [_rest(i, reads[i], about, factors) for i in range(BIAS, UNUSED.stop)]
    operands = [queries, keys, values, *rest]
    if biases:
        operands[BIAS] = biases
    if not back:
        results = [out, sums][: len(makes)]
    else:
        operands += [sums, out, out]
        results = [queries, keys, values, *([biases] if biases else [])][: len(makes)]
    used = {n for dims in operands for dim in dims for n in dim}
    return Rule(
        tuple(f for f in factors if f.name in used), tuple(operands), tuple(results)
    )


def _summed(name: str, size: int, kind: str, summed: bool) -> Factor:
    """A factor that some results lack, which are then terms."""
    return Factor(name, size, kind, "sum" if summed else "")


def _bias(bias: Value, heads: tuple[str, ...], rows: str, columns: str) -> Dims:
    """A bias is one for all examples or heads where it has one only."""
    examples, all_heads = bias.shape[:2]
    return (
        (EXAMPLES,) if examples > 1 else (),
        heads if all_heads > 1 else (),
        (rows,),
        (columns,),
    )


def _named(dims: Dims) -> set[str]:
    return {name for dim in dims for name in dim}


def _rest(i: int, value: Value, about: Attention, factors: list[Factor]) -> Dims:
    """Lengths of examples; of operands that say nothing, factors of their own."""
    if i in (QUERY_LENGTHS, KEY_LENGTHS) and about.padded:
        return ((EXAMPLES,),)
    letters = names(f"x{i}_", len(value.shape))
    factors += [
        Factor(n, size, BLOCKED) for n, size in zip(letters, value.shape, strict=True)
    ]
    return plain(letters)


RULES: Mapping[str, RuleFn] = {FORWARD: attention, BACKWARD: attention}
