"""``rhino profile``: what kernels and collectives take, measured or by a compiler."""

from __future__ import annotations

from pathlib import Path

import click
import jax
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from rhino_jax.api.cache import folder_of
from rhino_jax.api.profiles import profile_place
from rhino_jax.cluster.hardware import CPU
from rhino_jax.cluster.profile import Profile
from rhino_jax.options import Options
from rhino_jax.profiling.live import keep_memory
from rhino_jax.profiling.make import compiled_profile, measured_profile


@click.command()
@click.option("--compile-only", "name", default="", help="Ask this device's compiler.")
@click.option("--out", type=click.Path(path_type=Path), help="Where to write.")
@click.option("--simulated", default=0, help="Measure so many simulated CPU devices.")
def profile(name: str, out: Path | None, simulated: int) -> None:
    """Measure the attached devices, or ask the compiler of others (--compile-only v5e).

    A profile of the attached devices is kept beside the plans unless --out is given,
    and plans for these devices use it from then on. Others: profile=FILE.
    """
    if simulated:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", simulated)
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("")

        def told(what: str, done: int, total: int) -> None:
            progress.update(task, description=what, completed=done, total=total)

        if name:
            found = compiled_profile(name, told)
            place = out or Path(f"{name}.compile-only.json")
        else:
            devices = jax.devices()
            if devices[0].platform == CPU:
                keep_memory()
            found = measured_profile(devices, told)
            folder = folder_of(Options())
            assert folder is not None, "the default folder"
            place = out or profile_place(folder, devices)
    place.parent.mkdir(parents=True, exist_ok=True)
    found.save(place)
    Console().print(summary(found))
    click.echo(f"written to {place}")


def summary(profile: Profile) -> Table:
    """The curves and fits of a profile, with their errors."""
    table = Table(title=f"{profile.device}: {profile}")
    for heading in ("of", "type or count", "points", "share of peak", "error"):
        table.add_column(heading)
    for curve in profile.curves:
        low, high = min(curve.shares), max(curve.shares)
        shares = f"{low:.3g} to {high:.3g}" if low < high else f"{low:.3g}"
        table.add_row(
            curve.kind,
            curve.dtype,
            str(len(curve.shares)),
            shares,
            f"{curve.error:.0%}",
        )
    for one in profile.collectives:
        points = str(len(one.fit.points))
        kind = f"{one.fit.kind} ({one.link})"
        table.add_row(kind, str(one.fit.count), points, "", f"{one.error:.0%}")
    return table
