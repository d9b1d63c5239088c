"""The page of a run: one self-contained HTML file, and its main table for the terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from deepfusion.errors import InputError
from deepfusion.manifest import Manifest
from deepfusion.records import (
    Clusters,
    Evaluation,
    Registry,
    RegistryEntry,
    Rejected,
    Scores,
    Stored,
    Traffic,
    Transport,
)
from deepfusion.report.artefacts import counted
from deepfusion.report.charts import grouped_bars, heat_map, line_chart

Json = dict[str, Any]
Found = TypeVar("Found", bound=Stored)

METRICS = {
    "bits_per_byte": (
        "Bits per byte",
        ".3f",
        "Lower is better. Comparable between all models, whatever their tokenizers.",
    ),
    "log_perplexity": (
        "Log-perplexity",
        ".3f",
        "Nats per token, lower is better. Only models with the MoE's tokenizer compare, not devices and proxies.",
    ),
    "token_accuracy": (
        "Token accuracy",
        ".1%",
        "Share of completion tokens predicted exactly, higher is better; same tokenizer only.",
    ),
    "choice_accuracy": (
        "Multiple-choice accuracy",
        ".1%",
        "Higher is better. The option of the highest likelihood per byte is the model's choice; "
        "evaluation.json also has acc and "
        "acc_norm as lm-evaluation-harness defines them.",
    ),
}
# These compare models whatever their tokenizers.
COMPARABLE = ("bits_per_byte", "choice_accuracy")
_TITLE = "<title>DeepFusion report: "
# A terminal has no room for more domains.
MOST_COLUMNS = 6


@dataclass(frozen=True)
class Model:
    """One line of the comparison: metrics by domain, and whether its tokens are those of the MoE."""

    name: str
    by_domain: Mapping[str, Scores]
    same_tokenizer: bool
    who: dict[str, str]  # domain -> the device or proxy measured there

    def value(self, metric: str, domain: str) -> float | None:
        """The metric on a domain; None where it was not measured or does not compare."""
        if not self.same_tokenizer and metric not in COMPARABLE:
            return None
        return getattr(self.by_domain.get(domain), metric, None)

    def mean(self, metric: str, domains: list[str]) -> float | None:
        """Plain mean over the domains; None unless all of them are there."""
        values = [value for domain in domains if (value := self.value(metric, domain)) is not None]
        return sum(values) / len(values) if values and len(values) == len(domains) else None


def is_report(folder: Path) -> bool:
    """Whether a folder holds nothing but the page that `run` writes."""
    if (
        not folder.is_dir()
        or folder.is_symlink()
        or any(path.name != "index.html" for path in folder.iterdir())
    ):
        return False
    page = folder / "index.html"
    return not page.exists() or (page.is_file() and _TITLE in page.read_text("utf-8", "replace")[:2000])


def render(folder: Path) -> str:
    """The page as HTML; names that came with uploads are escaped."""
    environment = Environment(
        loader=PackageLoader("deepfusion", "report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"size": _size, "duration": _duration, "signed": _signed, "counted": counted}
    evaluation, manifest = _find(Evaluation, folder / "evaluation.json"), _manifest(folder)
    registry, clusters = _find(Registry, folder / "registry.json"), _find(Clusters, folder / "clusters.json")
    transport, rejected = (
        _find(Transport, folder / "transport.json"),
        _find(Rejected, folder / "rejected.json"),
    )
    models = compared(evaluation)
    return environment.get_template("report.html.j2").render(
        name=folder.resolve().name,
        facts=_facts(_text(folder / "config.yaml"), registry, manifest),
        config=_text(folder / "config.yaml"),
        evaluation=evaluation,
        models=models,
        tables=_metric_tables(models),
        bars=_bars(models),
        clusters=clusters,
        similarity=_similarity(clusters),
        devices=_devices(registry, clusters, transport),
        transport=transport,
        rejected=rejected and rejected.root,
        curves=_curves(folder / "metrics.jsonl"),
        expert_use=_expert_use(evaluation),
        manifest=manifest and manifest.model_dump(),
        stages=_stages(manifest),
        lineage=_lineage(manifest),
    )


def summary_table(folder: Path) -> Table | str:
    """The MoE beside its references in bits per byte, as a table for the terminal; or a line that says what is missing.

    Means: bits per byte, nats per token, token accuracy and multiple-choice accuracy.
    """
    models = compared(_find(Evaluation, folder / "evaluation.json"))
    if not models:
        return "not evaluated: no MoE yet, or no test documents (data.test)"
    domains = list(models[0].by_domain)
    shown = domains if len(domains) <= MOST_COLUMNS else []
    table = Table(
        title="Held-out text: bits per byte by domain, and means over the domains",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("", no_wrap=True)
    for heading in [*shown, "mean", "nats", "acc.", "choice"]:
        table.add_column(escape(heading), justify="right")
    for model in models:
        bits = [model.value("bits_per_byte", domain) for domain in shown]
        cells = [_number(value, ".3f") for value in [*bits, model.mean("bits_per_byte", domains)]]
        for metric in ("log_perplexity", "token_accuracy", "choice_accuracy"):
            cells.append(_number(model.mean(metric, _asked(models, metric)), METRICS[metric][1]))
        table.add_row(model.name, *cells, style="bold" if model is models[0] else None)
    return table


def compared(evaluation: Evaluation | None) -> list[Model]:
    """The models that an evaluation holds, the MoE first; empty without an MoE."""
    if evaluation is None or evaluation.moe is None:
        return []
    references = evaluation.references
    models = [Model("DeepFusion MoE", evaluation.moe.by_domain, True, {})]
    for name, found in (("No distillation", references.no_distillation), ("Untouched base", references.base)):
        if found:
            models.append(Model(name, found.by_domain, True, {}))
    if devices := references.devices:
        who = {domain: f"{best.device} ({best.type})" for domain, best in devices.items()}
        models.append(Model("Best device", devices, False, who))
    if proxies := references.proxies:
        own: dict[str, Scores] = {}
        who = {}
        for number, proxy in proxies.items():
            domain, scores = proxy.domain, proxy.by_domain[proxy.domain]
            if domain not in own or scores.bits_per_byte < own[domain].bits_per_byte:
                own[domain], who[domain] = scores, f"cluster {number} ({proxy.type})"
        models.append(Model("Best proxy", own, False, who))
    return models


def _metric_tables(models: list[Model]) -> list[Json]:
    """For each metric the models that compare in it, by domain, the best of each column marked."""
    tables = []
    for metric, (title, form, note) in METRICS.items():
        domains = _asked(models, metric)
        rows = []
        for model in models:
            values = [*(model.value(metric, domain) for domain in domains), model.mean(metric, domains)]
            if any(value is not None for value in values):
                rows.append((model, values))
        if not rows:
            continue
        columns = [
            [value for value in column if value is not None]
            for column in zip(*(values for _, values in rows), strict=True)
        ]
        choose = max if metric.endswith("accuracy") else min
        best = [choose(column) if column else None for column in columns]
        lines = [
            {
                "name": model.name,
                "cells": [
                    (_number(v, form), v is not None and v == b) for v, b in zip(values, best, strict=True)
                ],
            }
            for model, values in rows
        ]
        tables.append({"title": title, "note": note, "domains": domains, "lines": lines})
    return tables


def _asked(models: list[Model], metric: str) -> list[str]:
    """The domains on which the MoE has the metric (multiple choice needs options)."""
    return (
        [domain for domain in models[0].by_domain if models[0].value(metric, domain) is not None]
        if models
        else []
    )


def _bars(models: list[Model]) -> Markup | None:
    if not models:
        return None
    domains = list(models[0].by_domain)
    series = {model.name: [model.value("bits_per_byte", domain) for domain in domains] for model in models}
    return grouped_bars(domains, series, "Bits per byte by domain (lower is better)", ".3f")


def _similarity(clusters: Clusters | None) -> Markup | None:
    """Cosines of the devices' embeddings [DF eq. 6], devices ordered by cluster."""
    if clusters is None:
        return None
    names, matrix = clusters.similarity.devices, clusters.similarity.matrix
    order: list[int] = []
    breaks: list[int] = []
    for cluster in clusters.clusters:
        breaks.append(len(order))
        order += [names.index(device) for device in cluster.devices if device in names]
    if not order:
        return None
    ordered, labels = [[matrix[i][j] for j in order] for i in order], [names[i] for i in order]
    return heat_map(
        ordered, labels, labels, "Cosine similarity, ordered by cluster", ".2f", breaks[1:], high=1.0
    )


def _devices(
    registry: Registry | None, clusters: Clusters | None, transport: Transport | None
) -> list[tuple[RegistryEntry, int | None, Traffic | None]]:
    """Each accepted device, where it was put, what it moved."""
    placed = clusters.assignment if clusters else {}
    moved = transport.devices if transport else {}
    rows = [(e, placed.get(e.device), moved.get(e.device)) for e in (registry.root if registry else [])]
    return sorted(rows, key=lambda row: (row[1] is None, row[1] or 0, row[0].device))


def _curves(path: Path) -> list[Markup]:
    """One chart per stage, one line per unit; rows that a killed process left half written are skipped."""
    stages: dict[str, dict[str, dict[float, float]]] = {}
    for line in (_text(path) or "").splitlines():
        try:
            row = json.loads(line)
            step, loss = float(row["step"]), float(row["loss"])
        except (ValueError, KeyError, TypeError):
            continue
        if math.isfinite(loss):
            # A resumed training logs some steps again; the later row counts.
            stages.setdefault(str(row.get("stage")), {}).setdefault(str(row.get("unit")), {})[step] = loss
    return [
        line_chart(
            {unit: sorted(points.items()) for unit, points in sorted(units.items())},
            stage,
            "step",
            "training loss",
        )
        for stage, units in stages.items()
    ]


def _expert_use(evaluation: Evaluation | None) -> list[Markup]:
    """Per domain the share of each expert in each layer; all maps have one scale, so that they compare."""
    use = (evaluation and evaluation.expert_use) or {}
    highest = max((share for layers in use.values() for layer in layers for share in layer), default=1.0)
    charts = []
    for domain, layers in use.items():
        columns = [f"E{i}" for i in range(len(layers[0]))]
        rows = [f"layer {i}" for i in range(len(layers))]
        cell = 0 if len(columns) <= 8 else max(5, 420 // len(columns))
        charts.append(heat_map(layers, rows, columns, domain, ".0%", low=0.0, high=highest, cell=cell))
    return charts


def _facts(config: str | None, registry: Registry | None, manifest: Manifest | None) -> list[str]:
    """What the run is, in a few words, as far as it is known."""
    try:
        values = yaml.safe_load(config or "") or {}
    except yaml.YAMLError:
        values = {}
    facts = [f"recipe {values['recipe']}"] if values.get("recipe") else []
    if values.get("family"):
        facts.append(f"{values.get('experts')} experts of {values['family']}, top {values.get('top_k')}")
    if registry:
        prepared = any(entry.tokens for entry in registry.root)
        facts.append(f"{len(registry.root)} {'devices' if prepared else 'given checkpoints'}")
    if "seed" in values:
        facts.append(f"seed {values['seed']}")
    return [*facts, f"deepfusion {manifest.version}"] if manifest and manifest.version else facts


def _lineage(manifest: Manifest | None) -> list[tuple[str, str, str]]:
    """(stage, artefact, start of its digest) of everything that the finished stages left."""
    return [
        (name, path, digest[:16])
        for name, stage in (manifest.stages if manifest else {}).items()
        for path, digest in stage.digests.items()
    ]


def _stages(manifest: Manifest | None) -> list[Json]:
    """Name, status, seconds and peak memory of each stage, and its share of the longest time and the highest peak."""
    keep = {"status", "seconds", "peak_rss_bytes"}
    stages = manifest.stages if manifest else {}
    rows: list[Json] = [{"name": name, **stage.model_dump(include=keep)} for name, stage in stages.items()]
    for key in ("seconds", "peak_rss_bytes"):
        most = max((row.get(key) or 0 for row in rows), default=0) or 1
        rows = [{**row, f"{key}_share": (row.get(key) or 0) / most} for row in rows]
    return rows


def _find(kind: type[Found], path: Path) -> Found | None:
    """A record; None where it is missing or damaged, which the page then says."""
    try:
        return kind.find(path)
    except (InputError, OSError):
        return None


def _read(path: Path) -> Any:
    """A JSON file; None where it is missing or damaged, which the page then says."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None


def _manifest(folder: Path) -> Manifest | None:
    """None where it is missing or damaged, which the page then says."""
    try:
        return Manifest.read(folder)
    except InputError:
        return None


def _text(path: Path) -> str | None:
    try:
        return path.read_text("utf-8", errors="replace")
    except OSError:
        return None


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _signed(value: float) -> str:
    return format(value, "+.3f").replace("-", "\N{MINUS SIGN}")


def _size(count: float | None) -> str:
    """Bytes in decimal units, as on a network bill."""
    if count is None:
        return "–"
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
