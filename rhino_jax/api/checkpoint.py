"""States on disk: written whole or not at all, read back onto any plan.

A checkpoint is a folder of its own under the user's folder, named by its step. Orbax
writes it under another name and renames it when all of it is there. It holds the arrays
by their tree paths, whatever devices they lay on, and a list of them that is compared
before anything is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from rhino_jax import compat
from rhino_jax.api.across import from_whole
from rhino_jax.errors import CheckpointError, nearest, problems
from rhino_jax.trace.arguments import few, join, keys, leaves_of

FORMAT, VERSION = "rhino-checkpoint", 1
ARRAYS, CONTENTS = "state", "rhino"
"""Names of the two parts of a checkpoint."""
_FAULTS = (OSError, ValueError, RuntimeError)
"""What Orbax raises where a file can not be written or read."""

Kinds = Mapping[str, str]
"""What a leaf is ("float32[8, 4]"), by its tree path."""


def saved_steps(folder: str | Path) -> tuple[int, ...]:
    """The steps whose states are saved in ``folder``, in rising order.

    >>> saved_steps("/nowhere")
    ()
    """
    try:
        found = ocp.utils.checkpoint_steps(Path(folder).absolute())
    except FileNotFoundError:
        return ()
    return tuple(sorted(found))


def save(folder: str | Path, state: Any, step: int, keep: int | None) -> None:
    """Write ``state`` as the checkpoint of ``step``; see ``ParallelFunction.save``."""
    place = Path(folder).absolute()
    if step in saved_steps(place):
        raise CheckpointError(
            f"save: {place} holds a checkpoint of step {step} already; remove it, or "
            "save in another folder"
        )
    leaves = by_path(state)
    contents = {
        "format": FORMAT,
        "version": VERSION,
        "jax": jax.__version__,
        "leaves": {path: kind_of(x) for path, x in leaves.items()},
    }
    arrays = {path: _plain(x) for path, x in leaves.items() if np.size(x)}
    try:
        with _manager(place, max_to_keep=keep, cleanup_tmp_directories=True) as manager:
            manager.save(
                step,
                args=ocp.args.Composite(
                    **{
                        ARRAYS: ocp.args.StandardSave(arrays),
                        CONTENTS: ocp.args.JsonSave(contents),
                    }
                ),
            )
    except _FAULTS as error:
        steps = ", ".join(map(str, saved_steps(place))) or "none"
        raise CheckpointError(
            f"save: step {step} could not be written to {place}: {error}\nCheckpoints "
            f"there that are whole: {steps}. Free space, or save elsewhere."
        ) from error


def restore(
    folder: str | Path,
    step: int | None,
    tree: Any,
    kinds: Sequence[Any],
    homes: Sequence[Any],
) -> Any:
    """The state of a checkpoint, laid as a plan wants it.

    Args:
        step: of the checkpoint; None is the last.
        tree: the structure of the state.
        kinds, homes: shape and dtype, and sharding, of every leaf.
    """
    place = Path(folder).absolute()
    steps = saved_steps(place)
    if not steps or step not in (None, *steps):
        have = f"those of {', '.join(map(str, steps))}" if steps else "none"
        asked = "a checkpoint" if step is None else f"the checkpoint of step {step}"
        raise CheckpointError(f"restore: {asked} is wanted, {place} has {have}")
    step = steps[-1] if step is None else step
    paths = list(by_path(jax.tree.unflatten(tree, kinds)))
    wanted = {path: kind_of(kind) for path, kind in zip(paths, kinds, strict=True)}
    try:
        with _manager(place, create=False) as manager:
            found = differences(_contents(manager, step), wanted)
            if found:
                raise CheckpointError(
                    problems(
                        f"restore: {place}, step {step}, is of another model:",
                        few(found),
                        "Give the folder of this model, or change the model back.",
                    )
                )
            arrays = _read(manager, step, dict(zip(paths, kinds, strict=True)), homes)
    except _FAULTS as error:
        raise CheckpointError(
            f"restore: {place}, step {step}, can not be read: {error}"
        ) from error
    return jax.tree.unflatten(tree, [arrays[path] for path in paths])


def differences(saved: Kinds, wanted: Kinds) -> list[str]:
    """What a checkpoint has otherwise than wanted, one line for each leaf.

    >>> differences({"w": "float32[4]", "b": "float32[1]"}, {"w": "float32[8]"})
    ['w: float32[4] in the checkpoint, float32[8] here', 'b: only in the checkpoint']
    """
    found = [
        f"{path}: {saved[path]} in the checkpoint, {kind} here"
        for path, kind in wanted.items()
        if path in saved and saved[path] != kind
    ]
    extra = [path for path in saved if path not in wanted]
    for path in wanted:
        if path not in saved:
            alike = nearest(path, extra, 1)
            hint = f" (is it {alike[0]}?)" if alike else ""
            found.append(f"{path}: not in the checkpoint{hint}")
    return [*found, *(f"{path}: only in the checkpoint" for path in extra)]


def by_path(state: Any) -> dict[str, Any]:
    """The leaves of a state by their tree paths.

    Raises:
        CheckpointError: two leaves have one path.

    >>> by_path({"params": [1, 2]})
    {'params/0': 1, 'params/1': 2}
    """
    pairs = [(join(*keys(path)) or "state", x) for path, x in leaves_of(state)]
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = {path for path, _ in pairs if [p for p, _ in pairs].count(path) > 1}
        raise CheckpointError(
            f"a state with two leaves of one path: {', '.join(sorted(twice))}; rename "
            "keys that have a slash in them"
        )
    return found


def kind_of(x: Any) -> str:
    """Dtype and shape of a leaf in words.

    >>> kind_of(np.zeros((8, 4), np.float32))
    'float32[8, 4]'
    """
    dtype = x.dtype if hasattr(x, "dtype") else np.asarray(x).dtype
    return f"{dtype}{list(np.shape(x))}"


def _manager(place: Path, **options: Any) -> ocp.CheckpointManager:
    chosen = ocp.CheckpointManagerOptions(enable_async_checkpointing=False, **options)
    return ocp.CheckpointManager(place, options=chosen)


def _contents(manager: ocp.CheckpointManager, step: int) -> Kinds:
    """The list of leaves of a checkpoint."""
    wanted = ocp.args.Composite(**{CONTENTS: ocp.args.JsonRestore()})
    try:
        contents = manager.restore(step, args=wanted)[CONTENTS]
        if (contents["format"], contents["version"]) == (FORMAT, VERSION):
            leaves: Kinds = contents["leaves"]
            return leaves
    except (KeyError, TypeError, FileNotFoundError):
        pass
    raise CheckpointError(
        f"restore: {manager.directory}, step {step}, is no checkpoint that this Rhino "
        "wrote; read it with what wrote it, and place(state)"
    )


def _read(
    manager: ocp.CheckpointManager,
    step: int,
    kinds: Mapping[str, Any],
    homes: Sequence[Any],
) -> dict[str, Any]:
    """The arrays of a checkpoint by path, each read straight to where it belongs."""
    where = dict(zip(kinds, homes, strict=True))
    wanted = {
        path: _abstract(kind, where[path])
        for path, kind in kinds.items()
        if np.size(kind)
    }
    args = ocp.args.Composite(**{ARRAYS: ocp.args.StandardRestore(wanted)})
    read = manager.restore(step, args=args)[ARRAYS] if wanted else {}
    return {
        path: _typed(read.get(path), kind, where[path]) for path, kind in kinds.items()
    }


def _abstract(kind: Any, where: Any) -> jax.ShapeDtypeStruct:
    if compat.is_key(kind):
        bare = jax.ShapeDtypeStruct(kind.shape, kind.dtype)
        kind = jax.eval_shape(jax.random.key_data, bare)
    return jax.ShapeDtypeStruct(kind.shape, kind.dtype, sharding=where)


def _typed(x: Any, kind: Any, where: Any) -> jax.Array:
    """What was read as what was saved: of keys the words, of types not the weakness.

    Empty arrays are not kept at all.
    """
    if x is None:
        return from_whole(np.zeros(kind.shape, kind.dtype), where)
    if compat.is_key(kind):
        return jax.random.wrap_key_data(x, impl=compat.key_impl(kind.dtype))
    found: jax.Array = compat.as_weak(x) if kind.weak_type else x
    return found


def _plain(x: Any) -> Any:
    """``x`` as Orbax saves it from several processes: a global array, or NumPy's."""
    if compat.is_key(x):
        x = jax.random.key_data(x)
    local = jax.process_count() > 1 and getattr(x, "is_fully_addressable", False)
    return x if isinstance(x, jax.Array) and not local else np.asarray(x)
