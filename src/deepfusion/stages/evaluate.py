"""Held-out measurement: the MoE beside the untouched base, the control without distillation, devices and proxies."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from deepfusion import progress
from deepfusion.jobs import run_jobs
from deepfusion.learning.metrics import evaluate_model, expert_use
from deepfusion.models.compact import DELTA, Compact
from deepfusion.models.loading import compute_device, load_model, load_tokenizer
from deepfusion.models.presets import resolve
from deepfusion.records import (
    AgainstMembers,
    BestDevice,
    Clusters,
    Comparison,
    Evaluation,
    Means,
    Measured,
    MeasuredProxy,
    Measurement,
    References,
    Registry,
)
from deepfusion.schema import Config
from deepfusion.text.rows import Document
from deepfusion.text.sources import load_source
from deepfusion.text.splits import make_splits
from deepfusion.uploads.card import read_card

# The shares of experts settle long before the losses do.
EXPERT_USE_DOCUMENTS = 64


def run(config: Config, inputs: dict[str, Path], out: Path) -> dict[str, Any]:
    """Measure every model on the test documents and write `out`/evaluation.json.

    Args:
        inputs: any of `moe`, `control`, `base` (checkpoints), `uploads`, `proxies` (folders of checkpoints),
            `registry` and `clusters` (JSON files). What is missing is null in the result.
        out: also holds units/, one finished measurement a file, from which a killed stage continues.

    Returns:
        The MoE's means over the domains and its comparison with the references.

    Raises:
        InputError: data or models that cannot be read.
    """
    out.mkdir(parents=True, exist_ok=True)
    test, private = _documents(config)
    test = capped(test, config.evaluate.max_documents, config.seed)
    plan = _Plan(inputs, test, private)
    measured = _measure_all(config, plan, test, out / "units")
    moe = _metrics(measured, "moe")
    references = References(
        base=_metrics(measured, "base"),
        no_distillation=_metrics(measured, "control"),
        devices=_best_devices(plan, measured),
        proxies=_proxies(plan, measured),
    )
    comparison = _comparison(moe, references)
    Evaluation(
        moe=moe,
        references=references,
        proxy_against_members=_against_members(plan, measured),
        expert_use=measured["moe"].expert_use if moe else None,
        comparison=comparison,
    ).write(out / "evaluation.json")
    means = moe and {"mean_over_domains": moe.mean_over_domains.model_dump()}
    return {"moe": means, "comparison": comparison.model_dump()}


class _Plan:
    """Which model is measured on which domains: MoE, control and base on all, devices and proxies on their own.

    A device's own domain (`home`) is the domain of most of its private documents. It is None where these are not
    known, as with uploads from elsewhere; then every domain is tried.
    """

    def __init__(
        self, inputs: dict[str, Path], test: list[Document], private: dict[str, list[Document]]
    ) -> None:
        self.domains = sorted({document.domain for document in test})
        registry, clusters = Registry.find(inputs.get("registry")), Clusters.find(inputs.get("clusters"))
        self.devices = registry.root if registry else []
        self.clusters = clusters.clusters if clusters else []
        held = {entry.device: self._held(private.get(entry.device, [])) for entry in self.devices}
        self.home = {device: _majority(counts) for device, counts in held.items()}
        self.cluster_domain = {
            cluster.id: _majority(sum((held[device] for device in cluster.devices), Counter()))
            for cluster in self.clusters
        }
        self.folders: dict[str, Path] = {}
        self.wanted: dict[str, list[str]] = {}
        for name in ("moe", "control", "base"):
            self._add(name, inputs.get(name), self.domains)
        for cluster in self.clusters:
            number, members = cluster.id, [self.home[device] for device in cluster.devices]
            self._add(
                f"proxy {number}", _below(inputs, "proxies", number), [*members, self.cluster_domain[number]]
            )
        for device in self.home:
            shared = [self.cluster_domain[c.id] for c in self.clusters if device in c.devices]
            self._add(f"device {device}", _below(inputs, "uploads", device), [self.home[device], *shared])

    def _held(self, documents: list[Document]) -> Counter[str]:
        return Counter(document.domain for document in documents if document.domain in self.domains)

    def _add(self, name: str, folder: Path | None, domains: Iterable[str | None]) -> None:
        if folder is not None and folder.is_dir() and self.domains:
            known = {domain for domain in domains if domain is not None}
            self.folders[name] = folder
            self.wanted[name] = self.domains if None in domains else sorted(known)


def measure(
    name: str,
    unit: Path,
    folder: Path,
    documents: list[Document],
    batch_size: int,
    max_chars: int,
    choices: bool,
    precision: str,
    routers: bool,
) -> Measurement:
    """Measure one model, or read what an earlier attempt measured; the work of one process.

    Args:
        name: what people call the model, such as "device bank-1".
        unit: JSON file of the result.
        routers: whether the use of experts is measured too.
    """
    if found := Measurement.find(unit):
        return found
    model, tokenizer = _load(folder, precision), load_tokenizer(folder)
    sizes = {"batch_size": batch_size, "max_chars": max_chars}
    metrics = evaluate_model(model, tokenizer, documents, **sizes, choices=choices, lm_eval=False)
    use = None
    if routers:
        few = capped(documents, EXPERT_USE_DOCUMENTS, 0)
        use = expert_use(model, tokenizer, few, batch_size=batch_size, max_chars=max_chars)
    result = Measurement(metrics=Measured.model_validate(metrics), expert_use=use)
    unit.parent.mkdir(parents=True, exist_ok=True)
    result.write(unit)
    means, domains = result.metrics.mean_over_domains, list(result.metrics.by_domain)
    progress.say(
        f"[evaluate {name}] {means.bits_per_byte:.3f} bits per byte, {means.log_perplexity:.3f} nats per token, "
        f"token accuracy {means.token_accuracy:.1%} on "
        f"{', '.join(domains)}{' (mean over domains)' if len(domains) > 1 else ''}"
    )
    return result


def _measure_all(config: Config, plan: _Plan, test: list[Document], units: Path) -> dict[str, Measurement]:
    jobs = [
        {
            "name": name,
            "unit": units.joinpath(*name.split(" ", 1))
            / "measured.json",  # an id may be as long as a file name can be
            "folder": folder,
            "documents": [document for document in test if document.domain in plan.wanted[name]],
            "batch_size": config.evaluate.batch_size,
            "max_chars": config.data.max_chars,
            "choices": config.evaluate.choices,
            "precision": config.precision,
            "routers": name == "moe",
        }
        for name, folder in plan.folders.items()
    ]
    return dict(zip(plan.folders, run_jobs(measure, jobs, config.jobs), strict=True))


def _load(folder: Path, precision: str) -> PreTrainedModel:
    """A checkpoint, or the adapter or the change of an upload on the base that its card names."""
    if (folder / "adapter_config.json").is_file():
        base = load_model(resolve(read_card(folder).base), precision)
        model = PeftModel.from_pretrained(base, folder).merge_and_unload()
    elif (folder / DELTA).is_file():
        whole = Compact(folder, base_type := read_card(folder).base)
        model = load_model(resolve(base_type), precision)
        tensors = model.state_dict()
        for name in whole.names():
            tensors[name].copy_(whole.get(name))
    else:
        model = load_model(folder, precision)
    return model.to(compute_device()).eval()


def _documents(config: Config) -> tuple[list[Document], dict[str, list[Document]]]:
    """Test documents, and private documents by device where this run knows them."""
    if config.data.private or isinstance(config.devices, list):
        splits = make_splits(config)
        return splits.test, splits.private
    return (load_source(config.data.test) if isinstance(config.data.test, str) else []), {}


def capped(documents: list[Document], limit: int | None, seed: int) -> list[Document]:
    """At most `limit` documents of each domain, a seeded choice, in their order."""
    if limit is None:
        return documents
    chosen: set[int] = set()
    for domain in {document.domain for document in documents}:
        places = [i for i, document in enumerate(documents) if document.domain == domain]
        chosen.update(random.Random(f"{seed} {domain}").sample(places, min(limit, len(places))))
    return [documents[i] for i in sorted(chosen)]


def _best_devices(plan: _Plan, measured: dict[str, Measurement]) -> dict[str, BestDevice] | None:
    """For each domain the device at home there with the fewest bits per byte; devices differ in tokenizer."""
    best: dict[str, BestDevice] = {}
    for entry in plan.devices:
        found, home = _metrics(measured, f"device {entry.device}"), plan.home[entry.device]
        for domain, scores in found.by_domain.items() if found else ():
            at_home = home in (None, domain)
            if at_home and (domain not in best or scores.bits_per_byte < best[domain].bits_per_byte):
                best[domain] = BestDevice(device=entry.device, type=entry.type, **scores.model_dump())
    return dict(sorted(best.items())) or None


def _proxies(plan: _Plan, measured: dict[str, Measurement]) -> dict[str, MeasuredProxy] | None:
    proxies = {}
    for cluster in plan.clusters:
        if found := _metrics(measured, f"proxy {cluster.id}"):
            domain = _domain(plan, cluster.id, found)
            proxies[str(cluster.id)] = MeasuredProxy(
                type=cluster.type, devices=cluster.devices, domain=domain, **found.model_dump()
            )
    return proxies or None


def _against_members(plan: _Plan, measured: dict[str, Measurement]) -> list[AgainstMembers] | None:
    """Each proxy and its best member in nats per token on the cluster's domain: one model type, so they compare."""
    rows = []
    for cluster in plan.clusters:
        proxy = _metrics(measured, f"proxy {cluster.id}")
        members = [found for device in cluster.devices if (found := _metrics(measured, f"device {device}"))]
        if proxy and members:
            domain = _domain(plan, cluster.id, proxy)
            own = proxy.by_domain[domain].log_perplexity
            best = min(member.by_domain[domain].log_perplexity for member in members)
            rows.append(
                AgainstMembers(
                    cluster=cluster.id, domain=domain, proxy=own, best_member=best, difference=own - best
                )
            )
    return rows or None


def _domain(plan: _Plan, cluster: int, proxy: Measured) -> str:
    """The cluster's own domain; where it is not known, the one that its proxy predicts best."""
    known = plan.cluster_domain[cluster]
    return known or min(proxy.by_domain, key=lambda domain: proxy.by_domain[domain].bits_per_byte)


def _comparison(moe: Measured | None, references: References) -> Comparison:
    return Comparison(
        moe_minus_no_distillation=_difference(moe, references.no_distillation),
        moe_minus_base=_difference(moe, references.base),
        bits_per_byte_ratio_to_proxies=_ratio_to_proxies(moe, references.proxies),
    )


def _difference(moe: Measured | None, other: Measured | None) -> Means | None:
    """Means over the domains, MoE minus other (same tokenizer): losses below 0, accuracies above 0 favour the MoE."""
    if not moe or not other:
        return None
    ours, theirs = (one.mean_over_domains.model_dump(exclude_none=True) for one in (moe, other))
    return Means(**{key: value - theirs[key] for key, value in ours.items()})


def _ratio_to_proxies(moe: Measured | None, proxies: dict[str, MeasuredProxy] | None) -> float | None:
    """Bits per byte of the MoE over those of the proxies on their own domains.

    Both are means over the same domains, and a domain with several proxies counts once, so that neither a domain
    without a proxy nor one with many tilts the ratio.
    """
    if not moe or not proxies:
        return None
    own: dict[str, list[float]] = {}
    for proxy in proxies.values():
        own.setdefault(proxy.domain, []).append(proxy.by_domain[proxy.domain].bits_per_byte)
    of_moe = sum(moe.by_domain[domain].bits_per_byte for domain in own)
    return of_moe / sum(sum(values) / len(values) for values in own.values())


def _metrics(measured: dict[str, Measurement], name: str) -> Measured | None:
    return measured[name].metrics if name in measured else None


def _majority(counts: Counter[str]) -> str | None:
    return min(counts, key=lambda domain: (-counts[domain], domain), default=None)


def _below(inputs: dict[str, Path], key: str, name: object) -> Path | None:
    return inputs[key] / str(name) if key in inputs else None
