"""Cases of predicted against compiled memory: a model, a cluster, a kind of plan.

Models are the zoo's large ones in bfloat16, with a batch that fills the devices as a
user's would; unrolled models are cut to a few layers so that they compile in minutes.
``python -m benchmarks.prediction --memory`` runs them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax

import rhino_jax as rhino
from benchmarks.models import build
from benchmarks.models.zoo import Model
from rhino_jax.api.planned import Planned
from rhino_jax.cost.model import Prediction

CLUSTERS = ("h100:1x8", "h100:4x8", "v5e:4x4", "v5p:4x4x4")
SCALE = {"h100:1x8": 1.0, "h100:4x8": 4.0, "v5e:4x4": 0.5, "v5p:4x4x4": 8.0}
"""Of a batch that fills about half of ``h100:1x8``."""
BATCHES: Mapping[str, int] = {
    "gpt_unrolled": 8,
    "gpt_scanned": 8,
    "vit": 32,
    "resnet": 64,
    "moe": 8,
    "t5": 16,
    "recommender": 128,
}
"""How many of the zoo's large batches fill about half of ``h100:1x8``."""
DEPTHS = {"h100": 4, "v5e": 2, "v5p": 2}
"""Layers that are compiled: the TPU compiler takes ten times as long."""
SCANNED = frozenset(("gpt_scanned", "recommender"))
"""Compiled whole: their depth is a loop, or small."""

KINDS: Mapping[str, Mapping[str, Any]] = {
    "searched": {},
    "zero3": {"recipe": "zero3"},
    "megatron": {"recipe": "megatron"},
    "remat": {"recipe": "zero3", "remat": "boundary"},
    "microbatches": {"recipe": "zero3", "microbatches": 4},
    "tight": {},
}
"""Kinds of plan. *tight* is searched under :data:`TIGHT` of what *searched* needs."""
TIGHT = 0.6


@dataclass(frozen=True)
class Case:
    """One thing to predict and to compile. ``depth`` 0 is the model's own."""

    model: str
    cluster: str
    kind: str
    depth: int = 0

    @property
    def name(self) -> str:
        return f"{self.model}/{self.depth or 'full'} {self.kind} {self.cluster}"


@dataclass(frozen=True)
class Predicted:
    """A case's plan and what is predicted of it."""

    case: Case
    planned: Planned = field(repr=False)
    prediction: Prediction = field(repr=False)


def cases(
    models: tuple[str, ...],
    clusters: tuple[str, ...],
    kinds: tuple[str, ...],
    full_depth: bool = False,
) -> Iterator[Case]:
    """The grid, the quickly compiled first."""
    for cluster in clusters:
        depth = DEPTHS[cluster.partition(":")[0]]
        for kind in kinds:
            for model in models:
                whole = full_depth or model in SCANNED
                yield Case(model, cluster, kind, 0 if whole else depth)


def model_of(case: Case) -> tuple[Model, dict[str, jax.ShapeDtypeStruct]]:
    """The case's model, and the shapes of a batch that fills its cluster."""
    model = build(case.model, "large", depth=case.depth or None, dtype="bfloat16")
    times = round(BATCHES[case.model] * SCALE[case.cluster])
    shapes = {
        name: jax.ShapeDtypeStruct((times * leaf.shape[0], *leaf.shape[1:]), leaf.dtype)
        for name, leaf in model.batch_shapes.items()
    }
    return model, shapes


def predicted(case: Case) -> Predicted:
    """Plan a case and predict it.

    Raises:
        RhinoError: the plan that is asked for can not be.
    """
    model, batch = model_of(case)

    def planned(**options: Any) -> Planned:
        given = {"pipeline_stages": 1, **KINDS[case.kind], **options}
        return rhino.plan(
            model.train_step, model.state_shapes, batch, cluster=case.cluster, **given
        )

    found = planned()
    if case.kind == "tight":
        limit = int(TIGHT * found.prediction().peak_bytes)
        found = planned(memory_limit_bytes=limit)
    return Predicted(case, found, found.prediction())
