"""What compact uploads save and cost: `python benchmarks/compact.py RUN`.

RUN is a run folder with uploads of full weights. They are written again as `delta8` and `delta4` against the
public checkpoints that training began with; then bytes, errors and losses on the test text of the run are
compared. Writes benchmarks/compact.md."""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, get_args

from deepfusion import progress
from deepfusion.config import load_config
from deepfusion.models.compact import DELTA, open_base, open_whole, write_delta
from deepfusion.schema import Config
from deepfusion.sections import Encoding
from deepfusion.stages import evaluate, proxy, registry
from deepfusion.uploads.card import read_card, write_card

HERE = Path(__file__).parent
ENCODINGS: tuple[Encoding, ...] = get_args(Encoding)


def recode(full: Path, folder: Path, encoding: Encoding) -> None:
    """An upload of full weights as a compact one."""
    shutil.copytree(full, folder, ignore=shutil.ignore_patterns("model.safetensors", "card.json"))
    card, whole = read_card(full), open_whole(full)
    error = write_delta(
        folder, {name: whole.get(name) for name in whole.names()}, open_base(card.base), encoding
    )
    write_card(folder, card.model_copy(update={"encoding": encoding, "encoding_error": error}))


def measure(config: Config, run: Path, encoding: Encoding, out: Path) -> dict[str, Any]:
    """Bytes, errors and losses of all devices and cluster means with one encoding."""
    uploads = run / "uploads"
    if encoding != "weights":
        for full in sorted(uploads.iterdir()):
            recode(full, out / "uploads" / full.name, encoding)
        uploads = out / "uploads"
    inputs = {
        "uploads": uploads,
        "clusters": run / "clusters.json",
        "registry": out / "registry.json",
        "proxies": out / "proxies",
    }
    out.mkdir(exist_ok=True)
    registry.run(config, inputs, out)
    proxy.run(config, inputs, out)
    evaluate.run(config, inputs, out)
    entries = json.loads(inputs["registry"].read_text("utf-8"))
    clusters = json.loads(inputs["clusters"].read_text("utf-8"))["clusters"]
    weights = "model.safetensors" if encoding == "weights" else DELTA
    return {
        "bytes": {entry["device"]: (uploads / entry["device"] / weights).stat().st_size for entry in entries},
        "folder_bytes": {entry["device"]: entry["bytes"] for entry in entries},
        "error": {entry["device"]: entry["encoding_error"] for entry in entries},
        "device_loss": {entry["device"]: _loss(out, "device", entry["device"]) for entry in entries},
        "proxy_loss": {str(cluster["id"]): _loss(out, "proxy", str(cluster["id"])) for cluster in clusters},
        "clusters": clusters,
        "types": {entry["device"]: entry["type"] for entry in entries},
    }


def _loss(out: Path, kind: str, id: str) -> float:
    """Nats per token on the model's own domain."""
    found = json.loads((out / "units" / kind / id / "measured.json").read_text("utf-8"))
    return float(found["metrics"]["mean_over_domains"]["log_perplexity"])


def table(found: dict[str, dict[str, Any]]) -> str:
    """The comparison as Markdown."""
    columns = (
        "device",
        "type",
        "upload",
        "weights, bytes",
        "ratio",
        "folder, bytes",
        "largest error",
        "held-out loss",
        "difference",
    )
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    first = found["weights"]
    for device, type in first["types"].items():
        for encoding, row in found.items():
            ratio, loss = row["bytes"][device] / first["bytes"][device], row["device_loss"][device]
            lines.append(
                f"| {device} | {type} | `{encoding}` | {row['bytes'][device]:,} | {ratio:.3f} | "
                f"{row['folder_bytes'][device]:,} "
                f"| {row['error'][device]:.2g} | {loss:.4f} | {loss - first['device_loss'][device]:+.5f} |"
            )
    lines += ["", "| mean of | upload | held-out loss | difference |", "|---|---|---|---|"]
    for cluster in first["clusters"]:
        for encoding, row in found.items():
            loss = row["proxy_loss"][str(cluster["id"])]
            difference = loss - first["proxy_loss"][str(cluster["id"])]
            lines.append(
                f"| {', '.join(cluster['devices'])} | `{encoding}` | {loss:.4f} | {difference:+.5f} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Measure every encoding and write the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path, help="a run folder with uploads of full weights")
    parser.add_argument("--jobs", type=int, help="evaluations side by side")
    arguments = parser.parse_args()
    config = load_config(
        arguments.run / "config.yaml", [f"jobs={arguments.jobs or 'null'}", "evaluate.choices=false"]
    )
    with tempfile.TemporaryDirectory() as scratch:
        found = {
            encoding: measure(config, arguments.run, encoding, Path(scratch) / encoding)
            for encoding in ENCODINGS
        }
    uploads = [open_whole(folder) for folder in (arguments.run / "uploads").iterdir()]
    dtypes = {str(whole.dtype(name)).removeprefix("torch.") for whole in uploads for name in whole.names()}
    text = (
        "# Compact uploads on the quickstart\n\n"
        f"The devices of one run of the quickstart: seed {config.seed}, {config.device.steps} steps. Full weights are "
        f"{' and '.join(sorted(dtypes))}; where they are float32 the ratios are half of these. Beside "
        "the weights the folder\n"
        "holds a tokenizer and a config. The error is the largest of any weight. Losses are nats per "
        "token on test text of the\n"
        f"model's own domain, {config.evaluate.max_documents or 'all'} documents.\n\n"
        f"{table(found)}\n\nMade by `python benchmarks/compact.py RUN`.\n"
    )
    (HERE / "compact.md").write_text(text, "utf-8")


if __name__ == "__main__":
    progress.to_terminal()
    main()
