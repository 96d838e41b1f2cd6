"""What primitives mean: one file per family, each a table ``RULES``.

A rule is a function of the op and the values it reads and makes, and gives a
:class:`~rhino_jax.ir.factors.Rule`. Beside every file stands one of the same name in
``lower/local``, with how to run the op on one shard. :func:`rule_of` is the look-up.
"""

from rhino_jax.rules.registry import HEAVY as HEAVY
from rhino_jax.rules.registry import RULES as RULES
from rhino_jax.rules.registry import note_of as note_of
from rhino_jax.rules.registry import rule_of as rule_of
