"""Small files that stand beside the weights: model cards, and who moved how many bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from deepfusion import __version__
from deepfusion.config import Config


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


def write_final_card(config: Config, run: Path, folder: Path) -> None:
    """Write the card of the resulting MoE: lineage and, once there is an evaluation, how it measured.

    Args:
        run: the run folder that tells of uploads, clusters and evaluation; what is not there yet is left out.
        folder: the checkpoint that gets the card.
    """
    registry = {entry["device"]: entry for entry in _read(run / "registry.json", [])}
    clusters = _read(run / "clusters.json", {}).get("clusters", [])
    evaluation = _read(run / "evaluation.json", {})
    model = _read(folder / "config.json", {})
    metadata = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["mixture-of-experts", "deepfusion", "federated-learning", "knowledge-distillation"],
    }
    parts = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---",
        f"# DeepFusion MoE ({config.family})",
        f"One Mixture-of-Experts model made by DeepFusion {__version__} of {len(registry)} models that devices fine-tuned on text "
        f"which never left them. Recipe `{config.recipe}`, seed {config.seed}, {len(clusters) or config.experts} domains, "
        f"{config.experts} experts, top-{config.top_k}.",
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("this folder")\n'
        'tokenizer = AutoTokenizer.from_pretrained("this folder")\n```',
        _lineage(clusters, registry),
        f"Base: `{_base_name(config.distill.base)}`. Public text: {', '.join(config.data.public)}. "
        f"Architecture: {', '.join(model.get('architectures', [config.family]))}.",
        _metrics(evaluation),
        "The devices' text is not part of this model's training data, but weights can memorise: nothing here is a formal guarantee "
        "of privacy. Not for clinical or financial decisions.",
    ]
    (folder / "README.md").write_text("\n\n".join(part for part in parts if part) + "\n", "utf-8")


def _base_name(base: str | None) -> str:
    """Of a local folder the last part only: a path may name people."""
    return "the tiny base of the family" if base is None else Path(base).name if Path(base).exists() else base


def _lineage(clusters: list[dict[str, Any]], registry: dict[str, dict[str, Any]]) -> str:
    if not clusters:
        return ""
    rows = [
        f"| {cluster['id']} | {cluster['type']} | {device} | {registry[device]['tokens']} | `{registry[device]['digest'][:16]}` |"
        for cluster in clusters
        for device in cluster["devices"]
        if device in registry
    ]
    return "## Lineage\n\n| expert | type | device | private tokens | upload digest |\n|---|---|---|---|---|\n" + "\n".join(rows)


def _metrics(evaluation: dict[str, Any]) -> str:
    references = evaluation.get("references") or {}
    names = {
        "this model": evaluation.get("moe"),
        "no distillation": references.get("no_distillation"),
        "public base": references.get("base"),
    }
    rows = [
        f"| {name} | {m['log_perplexity']:.4f} | {m['bits_per_byte']:.4f} | {m['token_accuracy']:.2%} | "
        + ("-" if m["choice_accuracy"] is None else f"{m['choice_accuracy']:.2%}")
        + " |"
        for name, m in names.items()
        if m
    ]
    if not rows:
        return ""
    header = "| model | log-perplexity (nats/token) | bits per byte | token accuracy | choice accuracy |\n|---|---|---|---|---|\n"
    return "## Held-out text\n\n" + header + "\n".join(rows)


def _read(path: Path, missing: Any) -> Any:
    return json.loads(path.read_text("utf-8")) if path.is_file() else missing
