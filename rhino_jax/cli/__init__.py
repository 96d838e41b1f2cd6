"""The ``rhino`` command."""

from __future__ import annotations

import click

from rhino_jax.cli.demo import demo
from rhino_jax.cli.launch import launch
from rhino_jax.cli.profile import profile
from rhino_jax.cli.verify import verify
from rhino_jax.errors import RhinoError


class _Group(click.Group):
    """Shows a :class:`RhinoError` as a message, without a traceback."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except RhinoError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_Group)
def main() -> None:
    """Rhino: a JAX train step written for one device, run on many."""


main.add_command(demo)
main.add_command(launch)
main.add_command(profile)
main.add_command(verify)
