"""Options and prints that several commands share."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import rich
import typer

from deepfusion.cli import terminal
from deepfusion.errors import InputError
from deepfusion.manifest import Manifest
from deepfusion.records import Evaluation

ConfigFile = Annotated[Path | None, typer.Argument(help="YAML config; default: the quickstart")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="key=value, may be repeated")]
Json = Annotated[bool, typer.Option("--json", help="one JSON object on stdout, nothing else")]
From = Annotated[str | None, typer.Option("--from", help="redo this stage and what follows")]
Until = Annotated[str | None, typer.Option("--until", help="stop after this stage")]
Run = Annotated[Path, typer.Argument(help="a run folder")]


def need_flower() -> None:
    if find_spec("flwr") is None:
        raise InputError(
            "the federation needs Flower", fix="pip install deepfusion[federation]", code="no-flower"
        )


def plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=not terminal.utf8()))


def print_outcome(run: Path, json_: bool) -> None:
    """What a run came to, as far as it was made of what stands there now."""
    stages = Manifest.read(run).stages
    behind = {name for name, entry in stages.items() if entry.status != "done"}
    outdated = [name for name, entry in stages.items() if entry.status == "outdated"]
    final, page = run / "moe" / "final", run / "report" / "index.html"
    measured = Evaluation.find(run / "evaluation.json") if "evaluate" not in behind else None
    if json_:
        done = measured and measured.model_dump()
        return print_json(
            {"run": str(run), "checkpoint": str(final), "report": str(page), "evaluation": done, "outdated": outdated}
        )  # fmt: skip
    if measured is not None:
        from deepfusion.report.page import summary_table

        rich.print(summary_table(run))
    for name, stage, path in (("checkpoint", "tune", final), ("report", "report", page)):
        if path.exists() and stage not in behind:
            print(f"{name}: {path}")
    if outdated:
        print(f"outdated, for what they are made of has changed: {', '.join(outdated)}")
