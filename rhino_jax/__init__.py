"""Rhino: a JAX train step written for one device, run on many.

>>> import rhino_jax as rhino
>>> rhino.auto_parallel.__name__
'auto_parallel'
"""

from typing import TYPE_CHECKING, Any

from rhino_jax.api import ParallelFunction as ParallelFunction
from rhino_jax.api import auto_parallel as auto_parallel
from rhino_jax.api import follow as follow
from rhino_jax.api import global_shapes as global_shapes
from rhino_jax.api import initialize as initialize
from rhino_jax.api import name as name
from rhino_jax.api import plan as plan
from rhino_jax.api import saved_steps as saved_steps
from rhino_jax.errors import RhinoError as RhinoError
from rhino_jax.options import Options as Options
from rhino_jax.plan import Plan as Plan

# Loaded with all that plans, at first use.
if TYPE_CHECKING:
    from rhino_jax.api import Planned as Planned

__version__ = "0.1.0"


def __getattr__(attribute: str) -> Any:
    if attribute == "Planned":
        from rhino_jax.api import Planned

        return Planned
    raise AttributeError(f"module {__name__!r} has no attribute {attribute!r}")
