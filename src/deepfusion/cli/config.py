"""`deepfusion config`: look at and check configs."""

from __future__ import annotations

from typing import Annotated

import typer
import yaml

from deepfusion.cli.shared import ConfigFile, Json, Overrides, plain, print_json
from deepfusion.config import explain, load_config, nearest_key
from deepfusion.errors import InputError
from deepfusion.schema import Config

config_app = typer.Typer(help="Look at and check configs.", no_args_is_help=True)


@config_app.command("show")
def config_show(config: ConfigFile = None, set: Overrides = None, json_: Json = False) -> None:
    """Print the complete resolved config."""
    values = load_config(config, set or []).model_dump(mode="json")
    if json_:
        return print_json(values)
    print(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), end="")


@config_app.command("check")
def config_check(config: ConfigFile = None, set: Overrides = None, json_: Json = False) -> None:
    """Check a config: keys, types, data sources and models."""
    from deepfusion.families import bases
    from deepfusion.families.bases import base_checkpoint
    from deepfusion.text.splits import make_splits

    checked: Config = load_config(config, set or [])
    checked = bases.with_base(checked, bases.teachers_of_config(checked))
    bases.check(checked)
    base = base_checkpoint(checked)
    splits = make_splits(checked)
    facts = {
        "ok": True,
        "devices": {
            str(d.id): {"type": d.type, "documents": len(splits.private[str(d.id)])} for d in splits.devices
        },
        "public_documents": len(splits.public),
        "test_documents": len(splits.test),
        "base": str(base),
    }
    if json_:
        return print_json(facts)
    print(yaml.safe_dump(facts, sort_keys=False), end="")


@config_app.command("explain")
def config_explain(
    key: Annotated[str | None, typer.Argument(help="only keys that begin so")] = None, json_: Json = False
) -> None:
    """Print every key with its type, default and meaning."""
    rows = [
        row for row in explain() if key is None or row[0] == key or row[0].startswith(f"{key.rstrip('.')}.")
    ]
    if not rows:
        near = nearest_key(key or "")
        raise InputError(
            f"unknown key {key}", fix=f"did you mean {near}?" if near else None, code="unknown-key"
        )
    if json_:
        return print_json(
            {
                name: {"type": kind, "default": plain(value), "meaning": text}
                for name, kind, value, text in rows
            }
        )
    for name, kind, default, text in rows:
        print(f"{name}  ({kind}; default {plain(default)})\n    {text}")
