"""`signround-edge devices`: device profiles."""

from __future__ import annotations

import click

from signround_edge.commands.options import json_option
from signround_edge.commands.output import print_json, say


@click.command()
@click.option("--setup", multiple=True, metavar="NAME", help="Get what a device needs from package registries.")
@json_option
def devices(setup: tuple[str, ...], as_json: bool) -> None:
    """List the device profiles: which are ready here, and the command that makes the others so."""
    from devices import get_device
    from runtime_tests.device_status import list_devices, status_of
    from runtime_tests.setup.devices import set_up
    from signround_edge.terminal.devices import render

    profiles = [get_device(name) for name in setup]
    for profile in profiles:
        set_up(profile, say)
    rows = [status_of(profile) for profile in profiles] if profiles else list_devices()
    if as_json:
        print_json([row.to_json() for row in rows])
    else:
        click.echo("\n".join(render(rows)))
