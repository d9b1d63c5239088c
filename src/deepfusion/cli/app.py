"""The whole command: all groups, and those that other packages add by the entry point `deepfusion.commands`."""

from __future__ import annotations

import sys
from importlib.metadata import entry_points
from typing import Annotated

import typer

from deepfusion import __version__
from deepfusion.cli.config import config_app
from deepfusion.cli.device import device_app
from deepfusion.cli.model import model_app
from deepfusion.cli.models import models_app
from deepfusion.cli.run import run_app
from deepfusion.cli.server import server_app

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(run_app)
app.add_typer(model_app)
app.add_typer(models_app, name="models")
app.add_typer(device_app, name="device")
app.add_typer(server_app, name="server")
app.add_typer(config_app, name="config")
for command in entry_points(group="deepfusion.commands"):
    try:
        app.add_typer(command.load(), name=command.name)
    except Exception as error:  # of another package: its command is missing, all others work
        origin = command.dist.name if command.dist else command.module
        print(f"deepfusion: no command {command.name}, for {origin} is broken ({error!r})", file=sys.stderr)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"deepfusion {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Fuse fine-tuned small language models of many devices into one Mixture-of-Experts model."""
