"""Small files that stand beside the weights: model cards, and who moved how many bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import yaml

from deepfusion import __version__
from deepfusion.records import Cluster, Clusters, Evaluation, Registry, RegistryEntry, Traffic, Transport
from deepfusion.schema import Config


def write_model_card(folder: Path, title: str, text: str, facts: Mapping[str, object]) -> None:
    """Write `folder`/README.md: metadata that the Hugging Face hub reads, what the checkpoint is, and a table of
    facts.
    """
    rows = "".join(f"| {name} | {cell(value)} |\n" for name, value in facts.items())
    (folder / "README.md").write_text(
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [deepfusion]\n---\n\n"
        f"# {title}\n\n{text}\n\n| | |\n|---|---|\n{rows}",
        "utf-8",
    )


def cell(value: object) -> str:
    """A value as it may stand in a table of Markdown; much of it comes from strangers."""
    shown = "".join(c if c.isprintable() else " " for c in str(value))
    for mark, harmless in (("|", "\\|"), ("<", "&lt;"), ("`", "'")):
        shown = shown.replace(mark, harmless)
    return " ".join(shown.split())


def counted(number: int | None) -> str:
    """A number of tokens or documents; checkpoints that nobody prepared do not say theirs, and count 0."""
    return f"{number:,}" if number else "unknown"


def write_transport(uploads: Path, path: Path) -> None:
    """Write the bytes that uploads take on the network [DF eq. 5]: each device sends its folder once and downloads
    nothing.

    The public checkpoint that a device starts from is not counted: it comes from a public source, whatever happens
    to the run.
    """
    sizes = {
        folder.name: sum(file.lstat().st_size for file in folder.rglob("*") if not file.is_dir())
        for folder in sorted(uploads.iterdir())
        if folder.is_dir()
    }
    Transport.of({name: Traffic(up_bytes=size, down_bytes=0) for name, size in sizes.items()}).write(path)


def write_final_card(config: Config, run: Path, folder: Path) -> None:
    """Write the card of the resulting MoE: lineage and, once there is an evaluation, how it measured.

    Args:
        run: the run folder that tells of uploads, clusters and evaluation; what is not there yet is left out.
        folder: the checkpoint that gets the card.
    """
    accepted, grouped = Registry.find(run / "registry.json"), Clusters.find(run / "clusters.json")
    registry, clusters = accepted.by_device if accepted else {}, grouped.clusters if grouped else []
    model = folder / "config.json"
    known = json.loads(model.read_text("utf-8")) if model.is_file() else {}
    uploads = [entry for entry in registry.values() if entry.tokens]
    tags = [
        "mixture-of-experts",
        "deepfusion",
        *(["federated-learning"] if uploads else []),
        "knowledge-distillation",
    ]
    metadata = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags}
    tuned = f"Tuned for {config.tune.steps} steps" if config.tune.steps else "Not tuned after the merge"
    parts = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---",
        f"# DeepFusion MoE ({config.family})",
        "One Mixture-of-Experts model made by DeepFusion "
        f"{__version__}{_origin(len(uploads), len(registry) - len(uploads))}. "
        f"Recipe `{config.recipe}`, seed {config.seed}, {f'{len(clusters)} proxies, ' if clusters else ''}"
        f"{config.experts} experts, top-{config.top_k}. {tuned}.",
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("this folder")\n'
        'tokenizer = AutoTokenizer.from_pretrained("this folder")\n```',
        _lineage(clusters, registry),
        f"Base: `{cell(_base_name(config.distill.base))}`. {_texts(config)} "
        f"Architecture: {', '.join(known.get('architectures', [config.family]))}.",
        _metrics(Evaluation.find(run / "evaluation.json")),
        f"{_privacy(config, bool(uploads))} Not for clinical or financial decisions.",
    ]
    (folder / "README.md").write_text("\n\n".join(part for part in parts if part) + "\n", "utf-8")


def _origin(uploads: int, plain: int) -> str:
    parts = (
        [f" {_number(uploads, 'model')} that devices fine-tuned on text of their own, which no upload holds"]
        if uploads
        else []
    )
    parts += (
        [f" {_number(plain, 'checkpoint')} that {_were(plain)} given; how they were trained is not known"]
        if plain
        else []
    )
    return f" of{' and of'.join(parts)}" if parts else ""


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _were(count: int) -> str:
    return "was" if count == 1 else "were"


def _texts(config: Config) -> str:
    """What the server read for phases II and III."""
    if not (config.distill.steps or config.tune.steps):
        return "No text was read to make it."
    known = {
        "in_domain": "public text of the devices' domains",
        "generic": "generic public text",
        "sampled": "text that the proxies wrote",
    }
    return f"Text it learned from: {', '.join(known.get(name, f'`{cell(name)}`') for name in config.data.public)}."


def _privacy(config: Config, uploads: bool) -> str:
    wrote = ", and what the proxies wrote can repeat it" if "sampled" in config.data.public else ""
    unread = "No private text of a device was read to make it, but weights" if uploads else "Weights"
    return f"{unread} can memorise what a model was trained on{wrote}: this is no guarantee of privacy."


def _base_name(base: str | None) -> str:
    """Of a local folder the last part only: a path may name people."""
    return "the tiny base of the family" if base is None else Path(base).name if Path(base).exists() else base


def _lineage(clusters: list[Cluster], registry: dict[str, RegistryEntry]) -> str:
    rows = [
        f"| {cluster.id} | {cell(cluster.type)} | {cell(device)} | {counted(registry[device].tokens)} | "
        f"`{registry[device].digest[:16]}` |"
        for cluster in clusters
        for device in cluster.devices
        if device in registry
    ]
    header = "## Lineage\n\n| proxy | type | model of | private tokens | digest |\n|---|---|---|---|---|\n"
    return header + "\n".join(rows) if rows else ""


def _metrics(evaluation: Evaluation | None) -> str:
    """Means over the domains, as everywhere; those over all tokens stand in evaluation.json."""
    if evaluation is None or evaluation.moe is None:
        return ""
    names = {
        "this model": evaluation.moe,
        "no distillation": evaluation.references.no_distillation,
        "public base": evaluation.references.base,
    }
    forms = {
        "log_perplexity": ".3f",
        "bits_per_byte": ".3f",
        "token_accuracy": ".1%",
        "choice_accuracy": ".1%",
    }
    rows = []
    for name, found in names.items():
        if found:
            values = [scores.model_dump(exclude_none=True) for scores in found.by_domain.values()]
            known = {key: [row[key] for row in values if key in row] for key in forms}
            shown = [format(sum(v) / len(v), forms[key]) if v else "-" for key, v in known.items()]
            rows.append(f"| {name} | {' | '.join(shown)} |")
    domains = ", ".join(cell(domain) for domain in evaluation.moe.by_domain)
    header = (
        "| model | log-perplexity (nats/token) | bits per byte | token accuracy | choice "
        "accuracy |\n|---|---|---|---|---|\n"
    )
    return f"## Held-out text\n\nMean over the domains {domains}.\n\n{header}" + "\n".join(rows)
