"""What can go wrong on the user's side, by kind.

Every message says everything wrong at once, where it is, both numbers, and what to do
next. Faults of Rhino itself are assertions, not errors of these kinds.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RhinoError(Exception):
    """The base of every error that a user can cause or mend."""


class MeshError(RhinoError):
    """A mesh that does not match the devices."""


class PinError(RhinoError):
    """A pin on an unknown path, or one that does not divide."""


class TraceError(RhinoError):
    """A step that can not be traced as it stands."""


class SignatureError(RhinoError):
    """Arguments that do not fit the planned signature."""


class DonationError(RhinoError):
    """An array used again after its buffer was given away."""


class PlanFileError(RhinoError):
    """A plan file that is damaged or belongs to another program."""


class ProgramError(RhinoError):
    """A Program that breaks a law of the IR."""


class RuleError(RhinoError):
    """A rule that does not parse or does not fit its op."""


class ClusterError(RhinoError):
    """A cluster description that names nothing known."""


class ProfileError(RhinoError):
    """A profile that is damaged, of another version or of other hardware."""


class VerifyError(RhinoError):
    """A check with a real compiler that can not be made here."""


class InfeasibleError(RhinoError):
    """A request that no plan meets."""


class ProcessError(RhinoError):
    """Processes of one run that do not agree, or a launcher's half-set environment."""


class CheckpointError(RhinoError):
    """A checkpoint that can not be written, or belongs to another model."""


class OptionsError(RhinoError):
    """Options that contradict one another or are out of range."""


def nearest(word: str, words: Iterable[str], count: int = 3) -> list[str]:
    """The words most like ``word``, for "did you mean".

    >>> nearest("h10", ["h100", "a100", "v5e"])
    ['h100', 'a100']
    """
    return difflib.get_close_matches(word, list(words), count, 0.4)


def problems(title: str, items: Iterable[str], next_step: str = "") -> str:
    """One message from several problems.

    >>> print(problems("2 pins do not fit:", ["a: 3", "b: 5"], "Change them."))
    2 pins do not fit:
      - a: 3
      - b: 5
    Change them.
    """
    lines = [title, *(f"  - {item}" for item in items)]
    return "\n".join([*lines, next_step] if next_step else lines)
