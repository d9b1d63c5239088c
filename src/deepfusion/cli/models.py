"""The public checkpoints that go by a name: list them, make those that are made here."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deepfusion.cli.shared import Json, print_json

models_app = typer.Typer(
    invoke_without_command=True,
    help="The public checkpoints that go by a name, and those that are made here.",
)


@models_app.callback()
def show(context: typer.Context, json_: Json = False) -> None:
    """List them: size, class, tokens, licence, and where each would come from."""
    if context.invoked_subcommand is not None:
        return
    from deepfusion.models.presets import PRESETS, described

    found = [described(name) for name in PRESETS]
    if json_:
        return print_json({"models": found})
    table = Table(
        "name", "class", "weights", "layers", "tokens", "licence", "comes from", box=None, pad_edge=False
    )
    for row in found:
        table.add_row(
            row["name"], row["class"].removesuffix("ForCausalLM"), f"{row['weights'] / 1e6:,.1f}M",
            str(row["layers"]), f"{row['tokens']:,}", row["licence"], escape(row["source"]),
        )  # fmt: skip
    Console(width=200).print(table)  # one line each, whatever the width of the terminal


@models_app.command()
def make(
    names: Annotated[
        list[str] | None, typer.Argument(help="which; default: all that are not made yet", show_default=False)
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=0, max=10**6, help="steps of distillation; default: about a core-hour each"),
    ] = None,
) -> None:
    """Make on-device models of real size out of SmolLM2-135M, into the cache. Killed, it goes on where it was."""
    from deepfusion import small
    from deepfusion.models.presets import SMALL

    for name in names or SMALL:
        print(small.make(name, small.STEPS if steps is None else steps))
