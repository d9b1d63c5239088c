"""Small files that stand beside the weights: model cards, and who moved how many bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path


def write_model_card(folder: Path, title: str, text: str, facts: Mapping[str, object]) -> None:
    """Write `folder`/README.md: metadata that the Hugging Face hub reads, what the checkpoint is, and a table of facts."""
    rows = "".join(f"| {name} | {value} |\n" for name, value in facts.items())
    (folder / "README.md").write_text(
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [deepfusion]\n---\n\n"
        f"# {title}\n\n{text}\n\n| | |\n|---|---|\n{rows}",
        "utf-8",
    )


def write_transport(uploads: Path, path: Path) -> None:
    """Write the bytes that uploads take on the network [DF eq. 5]: each device sends its folder once and downloads nothing.

    The public checkpoint that a device starts from is not counted: it comes from a public source, whatever happens to the run.
    """
    devices = {
        folder.name: {"up_bytes": sum(file.lstat().st_size for file in folder.rglob("*") if not file.is_dir()), "down_bytes": 0}
        for folder in sorted(uploads.iterdir())
        if folder.is_dir()
    }
    total = sum(moved["up_bytes"] for moved in devices.values())
    path.write_text(json.dumps({"devices": devices, "total_up_bytes": total, "total_down_bytes": 0}, indent=1), "utf-8")
