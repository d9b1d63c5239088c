"""Phase I: average the members of each cluster into a proxy, the teacher of phase II."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from transformers import GenerationConfig

from deepfusion import plugins, progress
from deepfusion.errors import InputError
from deepfusion.folders import whole_folder
from deepfusion.models.adapters import ADAPTER_CONFIG, open_adapter
from deepfusion.models.architecture import architecture, read_config
from deepfusion.models.checkpoints import TensorWriter, copy_tokenizer, mean_of
from deepfusion.models.compact import DELTA, Compact, open_whole
from deepfusion.models.presets import base_digest, resolve
from deepfusion.records import Cluster, Clusters, Lineage, Registry, RegistryEntry
from deepfusion.report.artefacts import cell, counted
from deepfusion.schema import Config


def run(config: Config, inputs: dict[str, Path], out: Path) -> dict[str, Any]:
    """Writes `out`/proxies/<k>/: a Hugging Face checkpoint, the mean of the cluster's members [DF eq. 6].

    Raises:
        InputError: the public checkpoint of an adapter or a compact upload cannot be had.
    """
    registry = Registry.read(inputs["registry"]).by_device
    clusters = Clusters.read(inputs["clusters"]).clusters
    rule: Average = plugins.load("averages", config.clustering.average)
    for cluster in clusters:
        target = out / "proxies" / str(cluster.id)
        if (target / "proxy.json").is_file():
            continue
        members = [registry[name] for name in cluster.devices]
        with whole_folder(target) as part:
            with plugins.blamed("averages", rule):
                weights = rule.weights(members)
            _check_weights(config.clustering.average, weights, len(members))
            folders = [inputs["uploads"] / name for name in cluster.devices]
            with plugins.blamed("averages", rule):
                average(folders, members, weights, part, rule.combine)
            _describe(cluster, members, weights, part)
        names = ", ".join(cluster.devices)
        progress.say(f"[proxy {cluster.id}] mean of {len(members)} {cluster.type}: {names}")
    return {"proxies": len(clusters)}


@dataclass(frozen=True)
class Average:
    """A rule for the mean of a cluster; `clustering.average` names one (`plugins`, group averages).

    Attributes:
        weights: of the members, from what the registry says of each; only their ratios count.
        combine: one tensor of all members, one after the other, with those weights, into one of the given dtype.
    """

    weights: Callable[[Sequence[RegistryEntry]], list[float]]
    combine: Callable[[Iterable[torch.Tensor], Sequence[float], torch.dtype], torch.Tensor] = mean_of


def _alike(entries: Sequence[RegistryEntry]) -> list[float]:
    return [1.0] * len(entries)


def _by_tokens(entries: Sequence[RegistryEntry]) -> list[float]:
    """Checkpoints that nobody prepared do not say how much text they have seen: then all count alike."""
    tokens = [float(entry.tokens) for entry in entries]
    return tokens if all(tokens) else _alike(entries)


UNIFORM = Average(_alike)
TOKENS = Average(_by_tokens)


def _check_weights(rule: str, weights: Sequence[float], members: int) -> None:
    try:
        values = np.asarray(weights, float)
    except (TypeError, ValueError):
        values = np.empty(0)
    if values.shape != (members,) or not np.isfinite(values).all() or values.min() < 0 or values.sum() <= 0:
        raise InputError(
            f"{rule} gives {members} members the weights {str(weights)[:100]}", where="clustering.average",
            allowed="a number of 0 or more for each, not all 0", code="bad-average",
        )  # fmt: skip


def average(
    folders: list[Path],
    entries: list[RegistryEntry],
    weights: list[float],
    out: Path,
    combine: Callable[[Iterable[torch.Tensor], Sequence[float], torch.dtype], torch.Tensor] = mean_of,
) -> None:
    """`mbar = sum w_n m_n / sum w_n` over checkpoints of one type: accumulated in fp32, cast once, one tensor at a
    time.

    Args:
        folders: upload folders; an adapter stands for the public checkpoint plus its low-rank update, a compact upload
            for that checkpoint plus its change.
        entries: what the registry says of each.
        weights: of each in the mean; only their ratios count.
        out: folder of the averaged checkpoint.
        combine: the rule for one tensor (`Average.combine`).

    Raises:
        InputError: the public checkpoint of an adapter or a compact upload cannot be had, or buffers that must be
            equal differ.
    """
    dtype = torch.float32
    members = [_member(folder, entry) for folder, entry in zip(folders, entries, strict=True)]
    with TensorWriter(out) as writer:
        for name in members[0].names():
            first = members[0].get(name)
            if not first.is_floating_point():
                for folder, member in zip(folders[1:], members[1:], strict=True):
                    if not torch.equal(first, member.get(name)):
                        raise InputError(
                            f"{name} differs from the others", where=folder, code="buffers-differ"
                        )
                writer.add(name, first)
                continue
            dtype = _widest([member.dtype(name) for member in members])
            mean = combine((member.get(name) for member in members), weights, dtype)
            if combine is not mean_of:
                _check_mean(name, mean, first)
            writer.add(name, mean)
    config = read_config(folders[0])
    config.dtype = dtype
    config.save_pretrained(out)
    if (folders[0] / "generation_config.json").is_file():
        GenerationConfig.from_pretrained(folders[0]).save_pretrained(out)
    copy_tokenizer(folders[0], out)


def _check_mean(name: str, mean: Any, first: torch.Tensor) -> None:
    """What an own rule makes of a tensor would be blamed on the checkpoint later."""
    if not isinstance(mean, torch.Tensor) or mean.shape != first.shape or not mean.is_floating_point():
        found = f"{mean.dtype} {list(mean.shape)}" if isinstance(mean, torch.Tensor) else type(mean).__name__
        what = f"the rule makes {found} of tensors {list(first.shape)} called {name}"
    elif not mean.isfinite().all():
        what = f"the rule makes values that are no finite numbers of the tensors called {name}"
    else:
        return
    raise InputError(
        what, where="clustering.average", allowed=f"finite numbers {list(first.shape)}", code="bad-average"
    )


def _widest(dtypes: list[torch.dtype]) -> torch.dtype:
    return functools.reduce(torch.promote_types, dtypes)


class _Member(Protocol):
    def names(self) -> list[str]: ...
    def get(self, name: str) -> torch.Tensor: ...
    def dtype(self, name: str) -> torch.dtype: ...


def _member(folder: Path, entry: RegistryEntry) -> _Member:
    if (folder / ADAPTER_CONFIG).is_file():
        return _Adapted(folder, _base(entry))
    if (folder / DELTA).is_file():
        return Compact(folder, _base(entry))
    return open_whole(folder)


def _base(entry: RegistryEntry) -> str:
    """The model type whose public checkpoint an upload refers to."""
    if base_digest(entry.base) != entry.base_digest:
        raise InputError(
            f"the server's {entry.base} is not the checkpoint that the training began with",
            where=f"device {entry.device}",
            fix="bring the same revision to both sides",
            code="base-differs",
        )
    return entry.base


class _Adapted:
    """A public checkpoint with a LoRA update merged in exactly: `W + scale * B A`, in fp32."""

    def __init__(self, folder: Path, type: str) -> None:
        base = resolve(type)
        self.base = open_whole(base)
        self.transposed = architecture(read_config(base)).transposed
        self.adapter = open_adapter(folder)

    def names(self) -> list[str]:
        return self.base.names()

    def dtype(self, name: str) -> torch.dtype:
        return self.base.dtype(name)

    def get(self, name: str) -> torch.Tensor:
        weight = self.base.get(name)
        if name not in self.adapter.targets:
            return weight
        return weight.float() + self.adapter.update(name, name in self.transposed)


def _describe(cluster: Cluster, members: list[RegistryEntry], weights: list[float], folder: Path) -> None:
    shares = [f"{weight / sum(weights):.1%}" for weight in weights]
    rows = "\n".join(
        f"| {cell(e.device)} | {e.method if e.tokens else 'unknown'} | {counted(e.tokens)} | {share} |"
        for e, share in zip(members, shares, strict=True)
    )
    kind = cell(cluster.type)
    several = f"The element-wise weighted mean of {len(members)} models of type {kind}"
    made = several if len(members) > 1 else f"The one model of its cluster, of type {kind}"
    (folder / "README.md").write_text(
        f"# Proxy {cluster.id}\n\n{made}, made by DeepFusion: a teacher of phase II.\n\n"
        f"| model of | method | private tokens | weight |\n|---|---|---|---|\n{rows}\n",
        "utf-8",
    )
    Lineage(
        cluster=cluster.id, type=cluster.type, signature=cluster.signature,
        devices={entry.device: entry.digest for entry in members},
    ).write(folder / "proxy.json")  # fmt: skip
