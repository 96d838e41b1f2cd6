"""Errors of tracing in the user's terms: which line, what it did, what to write.

Only errors by which JAX says that a function can not be traced are turned into a
:class:`TraceError`. Everything else that is raised inside a step is the user's own
and passes through unchanged.
"""

from __future__ import annotations

import linecache
import re
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

LIBRARIES = (
    "jax jaxlib numpy flax optax equinox haiku chex orbax einops rhino_jax".split()
)
"""Packages whose lines are not the user's."""


@dataclass(frozen=True)
class _Reading:
    """An error of JAX, told apart by its type's name and maybe its text."""

    kinds: tuple[str, ...]
    what: str
    next_step: str
    text: str = ""


_LEAKED = (
    "a traced array is used outside the function (a step, a loop's body, a "
    "transformed function) that it belongs to",
    "Return it from that function instead of storing it in a list, a global or an "
    "attribute.",
)
_READINGS = (
    _Reading(
        ("NonConcreteBooleanIndexError",),
        "an array is indexed by a traced mask, so the shape of the result is unknown",
        "Use jnp.where(mask, x, fill), or jnp.nonzero(mask, size=n).",
    ),
    _Reading(
        ("TracerBoolConversionError",),
        "Python decides (if, while, and, or, assert) on a traced value",
        "Use jnp.where, jax.lax.cond or jax.lax.while_loop; give a setting that is "
        "known before the call by static_argnums.",
    ),
    _Reading(
        ("TracerIntegerConversionError",),
        "Python needs a traced value as an integer (range, a list's index, a shape)",
        "Use jax.lax.fori_loop or jnp.take; give a size that is known before the call "
        "by static_argnums.",
    ),
    _Reading(
        ("TracerArrayConversionError",),
        "numpy is handed a traced array",
        "Use jax.numpy, or jax.pure_callback for code that must run in numpy.",
    ),
    _Reading(
        ("ConcretizationTypeError",),
        "a traced value is turned into a Python number (float, int, .item())",
        "Return the array and convert it outside the step; give a setting that is "
        "known before the call by static_argnums.",
    ),
    _Reading(
        ("TypeError",),
        "a shape is made from a traced value",
        "Give a size that is known before the call by static_argnums.",
        "concrete values of integer type",
    ),
    _Reading(("UnexpectedTracerError",), *_LEAKED),
    _Reading(("Exception",), *_LEAKED, "Leaked trace"),
    _Reading(
        ("TraceContextError",),
        "an nnx module that the step closes over is changed",
        "Pass the module as an argument and return it.",
    ),
)

_ARGUMENT = re.compile(r"depends on the values? of the arguments? (.+?)\.(?:\s|$)")


def explain(error: Exception) -> str | None:
    """What a user did to cause ``error``, where, and what to do; None if not JAX's."""
    for reading in _READINGS:
        if type(error).__name__ in reading.kinds and reading.text in str(error):
            place = user_place(error)
            found = _ARGUMENT.search(str(error))
            of = f" It depends on the argument {found.group(1)}." if found else ""
            return f"{place}{reading.what}.{of}\n{reading.next_step}"
    return None


def leaked(lines: list[tuple[str, int]]) -> str:
    """The message for a step that reads arrays of some other trace."""
    what, next_step = _LEAKED
    places = [_written(*line) for line in dict.fromkeys(lines) if line[0]]
    where = "".join(f"\n  - {place}" for place in places)
    return f"{what}{':' if places else '.'}{where}\n{next_step}"


def user_place(error: BaseException) -> str:
    """``train.py:12: `if x > 0:`: `` for the innermost line of the user's own."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not _is_library(f.filename)]
    if not own:
        return ""
    return f"{_written(own[-1].filename, own[-1].lineno or 0)}: "


def _written(file: str, line: int) -> str:
    source = linecache.getline(file, line).strip()
    return f"{file}:{line}: `{source}`" if source else f"{file}:{line}"


def _is_library(file: str) -> bool:
    installed = "-packages/" in file
    if file.startswith("<frozen") or (file.startswith(_STANDARD) and not installed):
        return True
    modules = (sys.modules.get(name) for name in LIBRARIES)
    homes = (getattr(module, "__file__", None) for module in modules)
    return any(home and file.startswith(f"{Path(home).parent}/") for home in homes)


_STANDARD = f"{Path(traceback.__file__).parent}/"

_RESULT = "which is not a valid JAX type"
_CALL = (
    "Error interpreting argument",
    "Non-hashable static arguments",
    "Jitted function has static_arg",
    "Cannot interpret value of type",
)


def is_result_error(error: Exception) -> bool:
    """Whether JAX complains of what a jitted function returns."""
    return isinstance(error, TypeError) and _RESULT in str(error)


def is_call_error(error: Exception) -> bool:
    """Whether JAX complains of the arguments of a jitted function."""
    return isinstance(error, TypeError | ValueError) and str(error).startswith(_CALL)
