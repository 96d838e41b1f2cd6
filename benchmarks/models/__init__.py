"""The zoo: twenty steps for one device, as their authors would write them.

`ZOO[name](size)` or `build(name, size)` gives a `Model`: `"tiny"` to run anywhere,
`"medium"` to compile in seconds, `"large"` to plan from its shapes. Importing this
table imports no model (nor flax).
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

from benchmarks.models.zoo import Batch, Model, State, TrainStep, run_init

FIRST = ("gpt_unrolled", "gpt_scanned", "vit", "resnet", "moe", "t5", "recommender")
"""What is compiled, measured and audited most; the others widen what is met."""

NAMES = (
    *FIRST,
    *("bert", "clip", "unet", "wide_resnet", "vgg", "swin", "recurrence", "lstm"),
    *("graph", "diffusion", "lora", "decode", "pinn"),
)


def build(name: str, size: str = "tiny", **options: Any) -> Model:
    """Build the zoo's model `name`.

    Args:
        name: a key of `ZOO`.
        size: `"tiny"`, `"medium"` or `"large"`.
        options: `depth` (number of layers or blocks), `dtype` (`"float32"`,
            `"float64"` under x64, `"bfloat16"` compute), `optimizer` (an
            `optax.GradientTransformation` in place of the model's own).

    Raises:
        ValueError: an unknown name, size or dtype.
    """
    model: Model = _module(name).build(size, **options)
    return model


def materialize(
    name: str, size: str = "tiny", seed: int = 0, **options: Any
) -> tuple[TrainStep, State, Batch]:
    """`(train_step, state, batch)` of the model `name`, as arrays."""
    return run_init(build(name, size, **options), seed)


def _module(name: str) -> Any:
    if name not in NAMES:
        raise ValueError(f"model {name!r}: choose one of {', '.join(NAMES)}")
    return import_module(f"benchmarks.models.{name}")


ZOO: dict[str, Callable[..., Model]] = {name: partial(build, name) for name in NAMES}
