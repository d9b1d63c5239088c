"""`deepfusion device`: one device, on its own machine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import rich
import typer
from rich.markup import escape
from rich.table import Table

from deepfusion.cli.shared import ConfigFile, Json, Overrides, need_flower, print_json
from deepfusion.config import load_config
from deepfusion.errors import InputError
from deepfusion.sections import MOST_BATCH

device_app = typer.Typer(help="One device, on its own machine.", no_args_is_help=True)


@device_app.command("plan")
def device_plan(
    memory: Annotated[str, typer.Option(help="memory that training may take, such as 4GB")],
    text: Annotated[
        Path | None, typer.Option(help="JSONL file of the device, for the length of its texts")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, max=MOST_BATCH, help="documents per step")] = 8,
    types: Annotated[
        list[str] | None, typer.Option("--type", help="consider this type (repeatable); default: all presets")
    ] = None,
    json_: Json = False,
) -> None:
    """Which model types and training methods fit into this device's memory, with the estimate."""
    from deepfusion.families import base as families
    from deepfusion.learning.memory import parse_memory, plan_training
    from deepfusion.models.presets import PRESETS
    from deepfusion.text.sources import load_rows

    longest = max(len(e.text) for e in load_rows(str(text))) if text is not None else None
    bases = {families.get(name).tiny_base for name in families.names()}
    names = types or [name for name in PRESETS if name not in bases]
    plan = plan_training(parse_memory(memory), names, batch_size=batch_size, text=longest, precision="auto")
    if json_:
        return print_json(plan)
    table = Table("type", "method", "estimated", "needs", title=f"fits in {memory}")
    for row in plan["fits"]:
        table.add_row(
            escape(row["type"]),
            row["method"],
            f"{row['estimated_bytes'] / 2**30:.2f} GiB",
            escape(row["needs"]),
        )
    rich.print(table)
    chosen = plan["chosen"]
    if chosen is None:
        print("nothing fits: more memory, or a smaller --batch-size")
    else:
        first = "" if chosen["available"] else f", which first needs: {chosen['needs']}"
        print(f"chosen: {chosen['type']} with {chosen['method']}{first}")


@device_app.command("train")
def device_train(
    config: ConfigFile = None,
    data: Annotated[Path, typer.Option(help="private JSONL file")] = Path("private.jsonl"),
    out: Annotated[Path, typer.Option(help="upload folder to write")] = Path("upload"),
    type: Annotated[
        str | None, typer.Option(help="model type; default: the largest of device.types that fits --memory")
    ] = None,
    memory: Annotated[str | None, typer.Option(help="memory that training may take, such as 4GB")] = None,
    id: Annotated[
        str | None, typer.Option(help="name of this device; default: the name of the upload folder")
    ] = None,
    set: Overrides = None,
    json_: Json = False,
) -> None:
    """Train the on-device model on a private file and write the upload folder; needs no server."""
    from deepfusion.stages.device import train_alone

    card = train_alone(load_config(config, set or []), data, out, type, memory, id)
    if json_:
        return print_json(card)
    losses = f"{card['loss_before']:.3f} -> {card['loss_after']:.3f}"
    print(f"{out}: held-out loss {losses} nats/token; hand in this folder, nothing else")


@device_app.command("check")
def device_check(
    upload: Annotated[Path, typer.Argument(help="an upload folder")], json_: Json = False
) -> None:
    """Validate an upload folder as the server will."""
    from deepfusion.sections import FederationSection
    from deepfusion.uploads.check import check_upload

    problems = check_upload(upload, FederationSection().max_upload_bytes)
    errors = [{"code": p.code, "message": p.message, "file": p.file} for p in problems]
    if json_:
        print_json({"ok": not errors, "errors": errors})
    elif not errors:
        print(f"{upload}: a sound upload")
    for problem in errors if not json_ else []:
        print(f"{problem['file']}: {problem['message']} [{problem['code']}]", file=sys.stderr)
    if errors:
        raise typer.Exit(2)


@device_app.command("join")
def device_join(
    server: Annotated[str, typer.Option(help="HOST:PORT of the server")],
    data: Annotated[Path | None, typer.Option(help="private JSONL file to train on")] = None,
    upload: Annotated[
        Path | None, typer.Option(help="or an upload folder that device train made before")
    ] = None,
    out: Annotated[Path, typer.Option(help="upload folder to write")] = Path("upload"),
    type: Annotated[
        str | None, typer.Option(help="model type; default: the largest suggested one that fits --memory")
    ] = None,
    memory: Annotated[str | None, typer.Option(help="memory that training may take, such as 4GB")] = None,
    ca_sha256: Annotated[
        str | None, typer.Option(help="digest of the server's private authority, from the operator")
    ] = None,
    ca: Annotated[
        Path | None, typer.Option(help="or its certificate as a PEM file; default: public authorities")
    ] = None,
    home: Annotated[Path, typer.Option(help="where this device's key is kept")] = Path(
        "~/.deepfusion/device"
    ),
    json_: Json = False,
) -> None:
    """Take part in a federation: train on a private file, hand the model in once, get a receipt."""
    need_flower()
    from deepfusion.federation.device.join import join

    if (data is None) == (upload is None):
        raise InputError(
            "give either --data or --upload", allowed="--data FILE.jsonl | --upload FOLDER", code="bad-input"
        )
    if upload is not None and (type or memory):
        what = "--type and --memory are for a training, which --upload does without"
        raise InputError(what, fix="leave them out, or give --data", code="bad-usage")
    receipt = join(
        server, home, folder=upload or out, data=data, ca=ca, ca_sha256=ca_sha256, type=type, memory=memory
    )  # fmt: skip
    if json_:
        return print_json(receipt)
    when = "" if receipt["state"] == "done" else "; the run had begun without it, it is kept for the next"
    print(
        f"handed in as {receipt['device']}: {receipt['size']:,} bytes, digest {receipt['digest'][:16]}{when}"
    )
