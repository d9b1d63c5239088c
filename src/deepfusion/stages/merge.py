"""Stage merge: K dense bases become one MoE checkpoint [DF eq. 12-13]."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, GenerationConfig, PretrainedConfig

from deepfusion.digests import folder_digest, sha256_file
from deepfusion.errors import InputError
from deepfusion.families.base import MoELayout, merge_tensors, moe_config, parameter_count
from deepfusion.families.bases import layout
from deepfusion.models.checkpoints import TensorReader, TensorWriter, copy_tokenizer, tokenizer_files
from deepfusion.report.artefacts import write_model_card
from deepfusion.schema import Config

# Where a checkpoint came from, which says nothing about what it computes.
_PROVENANCE = {"_name_or_path", "transformers_version"}


def run(config: Config, inputs: dict[str, Path], out: Path) -> dict[str, object]:
    """Merges `inputs["bases"]/0..K-1` into `out/moe/merged`, a plain Hugging Face checkpoint with its tokenizer.

    `out/moe/untaught`, which the control of the tune stage starts from, is the same MoE made of the public base
    `inputs["base"]`.

    Returns:
        {"experts" and "top_k" (routed, as the model counts them), "total_parameters", "active_parameters", "digest"}.

    Raises:
        InputError: a base is missing or differs from base 0, or the bases do not fit the family or the layout.
    """
    folders = [inputs["bases"] / str(number) for number in range(config.experts)]
    summary = write_moe(config, folders, config.merge.router == "prototype", out / "moe" / "merged")
    if config.tune.control:
        write_moe(config, [inputs["base"]] * config.experts, False, out / "moe" / "untaught")
    return summary


def write_moe(config: Config, folders: list[Path], prototypes: bool, merged: Path) -> dict[str, object]:
    """Writes the MoE of the dense bases in `folders` to `merged`; with `prototypes` its router starts from theirs.

    Returns, Raises:
        As `run`.
    """
    base_config = _common_config(folders)
    _check_same_tokenizer(folders)
    shape = layout(config)
    target = moe_config(base_config, shape)
    router = _prototype_router(folders, base_config) if prototypes else None
    readers = [TensorReader(folder) for folder in folders]
    with TensorWriter(merged) as writer:
        for name, tensor in merge_tensors(shape, readers, base_config, router, seed=config.seed):
            writer.add(name, tensor)
    target.save_pretrained(merged)
    _save_generation_config(folders[0], target, merged)
    copy_tokenizer(folders[0], merged)
    count = parameter_count(target)
    write_model_card(merged, f"Merged {config.family}", _about(shape, folders), _facts(shape, count))
    return {
        "experts": shape.routed,
        "top_k": shape.split * shape.top_k,
        "total_parameters": count["total"],
        "active_parameters": count["active"],
        "digest": folder_digest(merged),
    }


def _about(shape: MoELayout, folders: list[Path]) -> str:
    part = "the FFN" if shape.split == 1 else f"one of {shape.split} slices of the FFN"
    if len(set(folders)) == 1:
        return (
            "A Mixture-of-Experts model made by DeepFusion of one dense base: every expert is "
            f"{part} of it, the rest its own."
        )
    return (
        f"A Mixture-of-Experts model merged by DeepFusion: an expert is {part} of a dense base, "
        "the rest the mean of the bases."
    )


def _facts(shape: MoELayout, count: dict[str, int]) -> dict[str, object]:
    return {
        "family": shape.family,
        "experts": f"{shape.routed}, {shape.split * shape.top_k} used per token",
        "parameters": f"{count['total']:,}, {count['active']:,} used per token",
        "shared expert": shape.shared,
    }


def _common_config(folders: list[Path]) -> PretrainedConfig:
    configs = []
    for folder in folders:
        if not (folder / "config.json").is_file():
            raise InputError(
                "no base checkpoint",
                where=folder,
                allowed=f"bases 0..{len(folders) - 1}",
                code="base-missing",
            )
        configs.append(AutoConfig.from_pretrained(folder))
    first = configs[0].to_dict()
    for folder, other in zip(folders[1:], configs[1:], strict=True):
        fields = other.to_dict()
        for key in sorted((first.keys() | fields.keys()) - _PROVENANCE):
            if first.get(key) != fields.get(key):
                raise InputError(
                    f"{key} is {fields.get(key)!r}",
                    where=folder / "config.json",
                    allowed=f"{first.get(key)!r} as in base 0",
                    code="bases-differ",
                )
    return configs[0]


def _check_same_tokenizer(folders: list[Path]) -> None:
    first = {path.name: sha256_file(path) for path in tokenizer_files(folders[0])}
    for folder in folders[1:]:
        other = {path.name: sha256_file(path) for path in tokenizer_files(folder)}
        for name in sorted(first.keys() | other.keys()):
            if first.get(name) != other.get(name):
                raise InputError(
                    "the tokenizer differs from that of base 0", where=folder / name, code="bases-differ"
                )


def _prototype_router(folders: list[Path], base_config: PretrainedConfig) -> Tensor:
    """Router rows fp32 [layers, K, hidden]: unit-length prototypes minus their mean over the bases."""
    prototypes = []
    for folder in folders:
        path = folder / "prototype.safetensors"
        if not path.is_file():
            raise InputError(
                "no prototype",
                where=path,
                fix="redo distill, or set merge.router=random",
                code="prototype-missing",
            )
        prototypes.append(_read_prototype(path, (base_config.num_hidden_layers, base_config.hidden_size)))
    rows = F.normalize(torch.stack(prototypes, dim=1), dim=-1)
    rows = rows - rows.mean(dim=1, keepdim=True)
    if len(folders) > 1 and not rows.flatten(1).norm(dim=1).gt(1e-6).all():
        raise InputError(
            "all prototypes are equal",
            where=folders[0].parent,
            fix="set merge.router=random",
            code="prototype-equal",
        )
    return rows


def _read_prototype(path: Path, shape: tuple[int, int]) -> Tensor:
    tensors = load_file(path)
    found = tensors.get("prototype")
    if found is None or tuple(found.shape) != shape or not found.isfinite().all():
        raise InputError(
            "no usable tensor prototype",
            where=path,
            allowed=f"finite numbers of shape {shape}",
            code="prototype-shape",
        )
    return found.float()


def _save_generation_config(base: Path, target: PretrainedConfig, merged: Path) -> None:
    known = (base / "generation_config.json").is_file()
    generation = (
        GenerationConfig.from_pretrained(base) if known else GenerationConfig.from_model_config(target)
    )
    generation.save_pretrained(merged)
