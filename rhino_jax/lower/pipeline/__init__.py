"""Pipelines: stages as jitted programs of their own, each on its devices (``program``),
and the layers of a scan as equal stages inside one program (``ticks``)."""
