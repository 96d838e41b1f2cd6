"""What ``planned.verify()`` gives back: a witness that prints itself."""

from __future__ import annotations

from dataclasses import dataclass

from rhino_jax.report.witness import witness_text
from rhino_jax.verify.witness import Witness


@dataclass(frozen=True)
class Verified(Witness):
    """A plan's predictions beside the compiled program; ``print`` shows all of it.

    ``ok`` is the verdict; :class:`~rhino_jax.verify.witness.Witness` has the figures.
    """

    def __str__(self) -> str:
        return witness_text(self)
