"""From a user's function to a Program: the door through which JAX comes in."""

from rhino_jax.trace.step import Traced as Traced
from rhino_jax.trace.step import trace as trace
