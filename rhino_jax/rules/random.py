"""Keys, random bits and iotas: what depends on where an element is.

Threefry draws element n of a shape from the counter n, so a shard draws its own bits
from its own counters. The other generators draw a stream: their draws are whole, and
so are keys of a kind not known here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rhino_jax.ir.factors import Factor, Rule
from rhino_jax.ir.program import Op, Value
from rhino_jax.rules.notation import RuleFn, elementwise, names, plain, whole

THREEFRY = "key<fry>"
"""The keys that are counters' ciphers: any element can be drawn alone."""

HASHED = (THREEFRY, "key<rbg>")
"""Keys that fold and split one by one, each a function of itself alone."""

SEEDED = (*HASHED, "key<urbg>")
"""Keys that are made of their seeds one by one."""


def iota(op: Op, reads: Sequence[Value], makes: Sequence[Value]) -> Rule:
    """Counts along one dimension; the same along all others."""
    letters = names("i", len(makes[0].shape))
    factors = tuple(
        Factor(n, size, "positional" if d == op.param["dimension"] else "parallel")
        for d, (n, size) in enumerate(zip(letters, makes[0].shape, strict=True))
    )
    return Rule(factors, (), (plain(letters),))


def _draw(op: Op, reads: Sequence[Value], makes: Sequence[Value]) -> Rule:
    """Something of shape ``shape`` drawn from every key: bits, or new keys."""
    (keys,) = reads
    split = op.kind == "random_split"
    if keys.dtype not in (HASHED if split else (THREEFRY,)):
        return whole(reads, makes)
    batch = names("b", len(keys.shape))
    drawn = names("i", len(op.param["shape"]))
    kind = "positional" if keys.dtype == THREEFRY else "blocked"
    factors = [Factor(n, size) for n, size in zip(batch, keys.shape, strict=True)]
    factors += [
        Factor(n, size, kind) for n, size in zip(drawn, op.param["shape"], strict=True)
    ]
    return Rule(tuple(factors), (plain(batch),), (plain((*batch, *drawn)),))


def _key_by_key(known: Sequence[str]) -> RuleFn:
    """Each key for itself, where the generator is one of ``known``."""

    def rule(op: Op, reads: Sequence[Value], makes: Sequence[Value]) -> Rule:
        if makes[0].dtype not in known:
            return whole(reads, makes)
        return elementwise(reads, makes)

    return rule


def _pure(op: Op, reads: Sequence[Value], makes: Sequence[Value]) -> Rule:
    return elementwise(reads, makes)


def _whole(op: Op, reads: Sequence[Value], makes: Sequence[Value]) -> Rule:
    return whole(reads, makes)


def _words(op: Op, reads: Sequence[Value], makes: Sequence[Value]) -> Rule:
    """Keys from their words or back: the words of one key stay together."""
    (read,), (made,) = reads, makes
    keys, words = sorted((read.shape, made.shape), key=len)
    letters = names("b", len(keys))
    inner = names("w", len(words) - len(keys))
    factors = [Factor(n, size) for n, size in zip(letters, keys, strict=True)]
    factors += [
        Factor(n, size, "blocked")
        for n, size in zip(inner, words[len(keys) :], strict=True)
    ]
    short, long = plain(letters), plain((*letters, *inner))
    wrapping = op.kind == "random_wrap"
    operand, result = (long, short) if wrapping else (short, long)
    return Rule(tuple(factors), (operand,), (result,))


RULES: Mapping[str, RuleFn] = {
    "iota": iota,
    "random_bits": _draw,
    "random_split": _draw,
    "random_seed": _key_by_key(SEEDED),
    "random_fold_in": _key_by_key(HASHED),
    "random_clone": _pure,
    "random_wrap": _words,
    "random_unwrap": _words,
    "threefry2x32": _pure,
    "threefry4x32": _pure,
    "philox2x32": _pure,
    "philox4x32": _pure,
    "rng_bit_generator": _whole,
    "rng_uniform": _whole,
}
