"""Phase I: average the members of each cluster into a proxy, the teacher of phase II."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from transformers import GenerationConfig

from deepfusion import models, progress
from deepfusion.checkpoints import TensorReader, TensorWriter, copy_tokenizer
from deepfusion.config import Config
from deepfusion.errors import InputError


def run(config: Config, inputs: dict[str, Path], out: Path) -> dict[str, Any]:
    """Writes `out`/proxies/<k>/: a Hugging Face checkpoint, the plain mean of the cluster's members.

    Raises:
        InputError: the public checkpoint of a LoRA upload cannot be had.
    """
    registry = {entry["device"]: entry for entry in json.loads(inputs["registry"].read_text("utf-8"))}
    clusters = json.loads(inputs["clusters"].read_text("utf-8"))["clusters"]
    for cluster in clusters:
        target = out / "proxies" / str(cluster["id"])
        if (target / "proxy.json").is_file():
            continue
        part = target.with_name(f".{target.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        average([inputs["uploads"] / name for name in cluster["devices"]], [registry[n] for n in cluster["devices"]], part)
        _describe(cluster, registry, part)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(part, target)
        progress.say(f"[proxy {cluster['id']}] mean of {len(cluster['devices'])} {cluster['type']}: {', '.join(cluster['devices'])}")
    return {"proxies": len(clusters)}


def average(folders: list[Path], entries: list[dict[str, Any]], out: Path) -> None:
    """`mbar = 1/|C| sum m_n` over checkpoints of one type: accumulated in fp32, cast once, one tensor at a time.

    Args:
        folders: upload folders; an upload with an adapter stands for the public checkpoint plus its low-rank update.
        entries: what the registry says of each (`base`, `base_digest`, `method`).
        out: folder of the averaged checkpoint.
    """
    members = [_member(folder, entry) for folder, entry in zip(folders, entries, strict=True)]
    with TensorWriter(out) as writer:
        for name in members[0].names():
            first = members[0].get(name)
            if not first.is_floating_point():
                writer.add(name, first)
                continue
            # Summing differences to the first keeps the mean of equal tensors bit-identical to them.
            origin = first.float()
            shift = torch.zeros_like(origin)
            for member in members[1:]:
                shift += member.get(name).float() - origin
            writer.add(name, (origin + shift / len(members)).to(members[0].dtype(name)))
    models.read_config(folders[0]).save_pretrained(out)
    if (folders[0] / "generation_config.json").is_file():
        GenerationConfig.from_pretrained(folders[0]).save_pretrained(out)
    copy_tokenizer(folders[0], out)


class _Member(Protocol):
    def names(self) -> list[str]: ...
    def get(self, name: str) -> torch.Tensor: ...
    def dtype(self, name: str) -> torch.dtype: ...


def _member(folder: Path, entry: dict[str, Any]) -> _Member:
    return _Adapted(folder, entry) if (folder / "adapter_config.json").is_file() else _Full(folder)


class _Full:
    """The tensors of a checkpoint under the names of the whole model; some hub checkpoints leave the trunk's prefix out."""

    def __init__(self, folder: Path) -> None:
        self.reader = TensorReader(folder)
        known = models.architecture(models.read_config(folder))
        stored = set(self.reader.names())
        self.stored = {name: name if name in stored else name.removeprefix(known.prefix) for name in known.tensors}
        self.stored = {name: own for name, own in self.stored.items() if own in stored}

    def names(self) -> list[str]:
        return sorted(self.stored)

    def get(self, name: str) -> torch.Tensor:
        return self.reader.get(self.stored[name])

    def dtype(self, name: str) -> torch.dtype:
        return self.reader.dtype(self.stored[name])


class _Adapted:
    """A public checkpoint with a LoRA update merged in exactly: `W + scale * B A`, in fp32."""

    def __init__(self, folder: Path, entry: dict[str, Any]) -> None:
        base = Path(models.resolve(entry["base"]))
        if models.base_digest(entry["base"]) != entry["base_digest"]:
            raise InputError(
                f"the server's {entry['base']} is not the checkpoint that the adapter was trained on",
                where=f"device {entry['device']}", fix="bring the same revision to both sides", code="base-differs",
            )  # fmt: skip
        self.base = _Full(base)
        self.transposed = models.architecture(models.read_config(base)).transposed
        self.settings = json.loads((folder / "adapter_config.json").read_text("utf-8"))
        self.adapter = safe_open(str(folder / "adapter_model.safetensors"), framework="pt")
        pattern = re.compile(r"base_model\.model\.(.+)\.lora_A\.weight")
        self.targets = {f"{found[1]}.weight": found[1] for key in self.adapter.keys() if (found := pattern.fullmatch(key))}  # noqa: SIM118

    def names(self) -> list[str]:
        return self.base.names()

    def dtype(self, name: str) -> torch.dtype:
        return self.base.dtype(name)

    def get(self, name: str) -> torch.Tensor:
        weight = self.base.get(name)
        if name not in self.targets:
            return weight
        a, b = (
            self.adapter.get_tensor(f"base_model.model.{self.targets[name]}.lora_{side}.weight").float() for side in "AB"
        )
        rank = self.settings["r"]
        scale = self.settings["lora_alpha"] / (rank**0.5 if self.settings.get("use_rslora") else rank)
        update = scale * (b @ a)
        return weight.float() + (update.T if name in self.transposed else update)


def _describe(cluster: dict[str, Any], registry: dict[str, Any], folder: Path) -> None:
    lineage = {
        "cluster": cluster["id"],
        "type": cluster["type"],
        "signature": cluster["signature"],
        "devices": {name: registry[name]["digest"] for name in cluster["devices"]},
    }
    rows = "\n".join(f"| {name} | {registry[name]['method']} | {registry[name]['tokens']} |" for name in cluster["devices"])
    (folder / "README.md").write_text(
        f"# Proxy {cluster['id']}\n\nThe element-wise mean of {len(cluster['devices'])} models of type {cluster['type']}, made by "
        f"DeepFusion: the teacher of base {cluster['id']}.\n\n| device | method | private tokens |\n|---|---|---|\n{rows}\n",
        "utf-8",
    )
    (folder / "proxy.json").write_text(json.dumps(lineage, indent=1), "utf-8")
