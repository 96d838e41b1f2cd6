"""Arguments made ready for a call: alive, where the plan wants them, given once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from rhino_jax.api.across import from_rows, from_whole, laid, rows_of
from rhino_jax.api.entry import Entry
from rhino_jax.errors import DonationError, SignatureError, problems
from rhino_jax.trace.arguments import join, keys, leaves_of, positional_names


def concrete(x: Any) -> bool:
    """Whether ``x`` is an array that holds data (no tracer, no shape)."""
    return isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)


def check_alive(
    fun: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    given_away: Callable[[Any], str],
) -> None:
    """Raise :class:`DonationError` for arrays whose buffer was given away.

    ``given_away`` says where ("" where that is not known).
    """
    names = positional_names(fun, len(args))
    dead: list[str] = []
    for name, tree in [*zip(names, args, strict=True), *kwargs.items()]:
        for path, x in leaves_of(tree):
            if concrete(x) and x.is_deleted():
                where = given_away(x)
                path_text = join(name, *keys(path))
                dead.append(f"{path_text}: {where or 'deleted elsewhere'}")
    if dead:
        more = [f"and {len(dead) - 3} more"] if len(dead) > 3 else []
        raise DonationError(
            problems(
                "arrays are used again whose buffers are gone:",
                [*dead[:3], *more],
                "The buffers of a state go to the next one. Use the state which that "
                "call returned, or decorate with donate=False.",
            )
        )


def placed(entry: Entry, leaves: list[Any]) -> tuple[list[Any], list[str]]:
    """Committed arrays that lie elsewhere moved to the plan's layout; says which.

    What is not committed JAX places itself, but for NumPy arrays on the devices of
    several processes: there every process holds them whole. The arrays that were given
    stay alive.
    """
    found, moved = list(leaves), []
    for i, (x, where) in enumerate(zip(leaves, entry.wanted, strict=False)):
        if entry.across and isinstance(x, np.ndarray):
            found[i] = from_whole(x, where)
        if not concrete(x) or not x.committed:
            continue
        if not x.sharding.is_equivalent_to(where, x.ndim):
            found[i] = _copied_to(x, where)
            path = entry.planned.traced.input_paths[i]
            moved.append(f"{path} on {_lies(x.sharding)}, planned {_lies(where)}")
    return found, moved


def _copied_to(x: Any, where: jax.sharding.Sharding) -> jax.Array:
    """``x`` laid as ``where`` says; it keeps no buffer of ``x``, which may be donated.

    ``device_put`` does so where a device is in both, whatever ``may_alias`` says; on a
    CPU it keeps the memory of a NumPy array too, which two leaves may share.
    """
    if concrete(x) and x.sharding.device_set & where.device_set:
        x = x.copy()
    elif isinstance(x, np.ndarray):
        x = np.array(x)
    return laid(x, where)


def _lies(sharding: jax.sharding.Sharding) -> str:
    devices = list(sharding.device_set)
    which = str(devices[0]) if len(devices) == 1 else f"{len(devices)} devices"
    spec = getattr(sharding, "spec", None)
    return which if spec is None else f"{which} as {spec}"


def notice(name: str, moved: Sequence[str]) -> str:
    """The words for arguments that were moved."""
    more = [f"and {len(moved) - 3} more"] if len(moved) > 3 else []
    return problems(
        f"{name}: arguments lay elsewhere and were moved (said once):",
        [*moved[:3], *more],
        f"Place them once with {name}.place(state) or {name}.shard_batch(batch).",
    )


def given_once(entry: Entry, leaves: list[Any]) -> list[Any]:
    """``leaves`` with a copy wherever a donated buffer is among them a second time.

    A state may hold one array twice (an average that starts as the parameters).
    """
    if not entry.donates:
        return leaves
    donated = set(entry.planned.traced.donated)
    seen: set[Any] = set()
    # What is not donated comes first: it keeps the buffer.
    order = sorted(range(len(leaves)), key=lambda i: i in donated)
    found = list(leaves)
    for i in order:
        if not concrete(leaves[i]):
            continue
        buffer = _buffer(leaves[i])
        if i in donated and buffer in seen:
            found[i] = leaves[i].copy()
        seen.add(buffer)
    return found


def _buffer(x: jax.Array) -> Any:
    shards = x.addressable_shards
    if not shards or jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        return id(x)
    return shards[0].device, shards[0].data.unsafe_buffer_pointer()


def put(
    method: str, entries: Sequence[Entry], tree: Any, hint: str, name: str, last: bool
) -> Any:
    """``tree`` laid as the argument of the plans that it fits, the newest first.

    Args:
        last: look at the arguments from the last (the batch) to the first (the state).

    Raises:
        SignatureError: nothing is planned yet, or no argument has this tree and shapes.
    """
    if not entries:
        raise SignatureError(f"{method}: nothing is planned yet; call {hint} first")
    leaves = jax.tree.leaves(tree)
    structure: Any = jax.tree.structure(tree)
    known: list[str] = []
    for entry in entries:
        planned = entry.planned.attached()
        traced, devices = planned.traced, planned.devices
        args, kwargs = planned.in_shardings
        numbers = jax.tree.unflatten(traced.in_tree, range(traced.num_inputs))
        given = list(zip((*args, *kwargs.values()), _arguments(numbers), strict=True))
        for where, places in reversed(given) if last else given:
            if jax.tree.structure(where) != structure:
                known.append(str(jax.tree.structure(where)))
                continue
            paths = [traced.input_paths[i] for i in places]
            kinds = [traced.avals[i] for i in places]
            homes = jax.tree.leaves(where)
            wrong = _misfits(paths, kinds, leaves, devices if last else frozenset())
            if not wrong:
                fits = zip(leaves, kinds, homes, strict=True)
                laid = [_put(x, aval.shape, home, devices) for x, aval, home in fits]
                return jax.tree.unflatten(structure, laid)
            known += wrong
    raise SignatureError(
        problems(
            f"{method}: no argument of {name} is like this; it takes:",
            list(dict.fromkeys(known))[:8],
            f"given: {structure}\nPlan for it first: {name}.planned(state, batch).",
        )
    )


def _arguments(numbers: Any) -> list[list[int]]:
    args, kwargs = numbers
    return [jax.tree.leaves(part) for part in (*args, *kwargs.values())]


def _misfits(
    paths: Sequence[str],
    kinds: Sequence[Any],
    leaves: Sequence[Any],
    devices: frozenset[Any],
) -> list[str]:
    """Leaves of other shapes than planned; a process may hold its rows of a batch
    that the processes of ``devices`` share."""
    found = []
    for path, aval, leaf in zip(paths, kinds, leaves, strict=True):
        rows = rows_of(aval.shape, devices) if devices else aval.shape
        if np.shape(leaf) not in (rows, aval.shape):
            own = "" if rows == aval.shape else f" (this process's rows {rows})"
            found.append(f"{path} of shape {aval.shape}{own}, given {np.shape(leaf)}")
    return found


def _put(
    x: Any, shape: tuple[int, ...], where: Any, devices: frozenset[Any]
) -> jax.Array:
    if concrete(x) and x.committed and x.sharding.is_equivalent_to(where, x.ndim):
        return x
    if np.shape(x) != shape:
        return from_rows(x, shape, where, devices)
    return _copied_to(x, where)


def taken(init_fn: Callable[..., Any], args: Sequence[Any]) -> Sequence[Any]:
    """As many of ``args`` as the signature of ``init_fn`` takes.

    Raises:
        SignatureError: it takes more, or other arguments.
    """
    try:
        signature = inspect.signature(init_fn)
    except (TypeError, ValueError):
        return args[:1]
    for count in range(len(args), -1, -1):
        try:
            signature.bind(*args[:count])
        except TypeError:
            continue
        return args[:count]
    raise SignatureError(
        f"init_fn takes {signature}; it was given up to {len(args)} arguments"
    )
