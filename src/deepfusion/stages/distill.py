"""Phase II: distil every proxy into a dense base; in recipe `fused` by way of one trunk that all proxies teach."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from deepfusion import plugins, progress
from deepfusion.families.base import check_base
from deepfusion.families.bases import base_checkpoint
from deepfusion.folders import remove, whole_folder
from deepfusion.jobs import run_jobs
from deepfusion.learning.corpus import Window, build_corpus, read_corpus, reading_periods, write_corpus
from deepfusion.learning.distillation import Collator, Distiller, LossWeights, Teacher
from deepfusion.learning.memory import estimate_training_bytes, require_memory
from deepfusion.learning.order import reading_order
from deepfusion.learning.training import train
from deepfusion.models.architecture import parameter_total, read_config
from deepfusion.models.checkpoints import numbered
from deepfusion.models.loading import (
    compute_device,
    context_limit,
    load_model,
    load_tokenizer,
    resolve_precision,
)
from deepfusion.report.artefacts import write_model_card
from deepfusion.schema import Config, effective_handover
from deepfusion.text.splits import make_splits


def run(
    config: Config, inputs: dict[str, Path], out: Path, method: Callable[..., nn.Module] | None = None
) -> dict[str, Any]:
    """Writes `out`/bases/: corpus.jsonl, trunk/ where there is one, and one checkpoint 0/, 1/, ... per expert.

    Base k learns from proxy k. More proxies than experts teach a trunk that is all there is to learn
    (`clustering.proxies`).

    `distill.steps` is shared out: `trunk_share` of it to the trunk, the rest in equal parts to the bases.

    Args:
        method: what learns, a class or function of a module's top level, made and called like `Distiller`; by default
            what `distill.method` names.
    """
    method = method or plugins.load("methods", config.distill.method)
    bases, work = out / "bases", out / "work"
    bases.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    proxies = numbered(inputs["proxies"])
    start = base_checkpoint(config)
    check_base(config.family, read_config(start))
    trunk_steps = round(config.distill.steps * config.distill.trunk_share)
    if trunk_steps and not (bases / "trunk").is_dir():
        _check_memory(config, start, proxies)
    if not (bases / "corpus.jsonl").is_file():
        write_corpus(build_corpus(config, make_splits(config), proxies, work), bases / "corpus.jsonl")
    corpus = read_corpus(bases / "corpus.jsonl")

    branch_steps = (config.distill.steps - trunk_steps) // config.experts
    if trunk_steps:
        trunk = {
            "config": config, "start": start, "proxies": dict(enumerate(proxies)), "windows": corpus,
            "steps": trunk_steps,
            "train_all": True, "unit": "trunk", "out": bases / "trunk", "work": work / "trunk", "method": method,
        }  # fmt: skip
        run_jobs(distill, [trunk], config.jobs)
        start = bases / "trunk"
    jobs = [
        {"config": config, "start": start, "proxies": {k: proxies[k]}, "windows": _texts(config, corpus, k,
        bool(trunk_steps)),
         "steps": branch_steps, "train_all": config.distill.train == "all", "unit": f"base {k}", "out": bases / str(k),
         "work": work / str(k), "method": method}
        for k in range(config.experts)
    ]  # fmt: skip
    losses = run_jobs(distill, jobs, config.jobs)
    return {
        "documents": len(corpus),
        "trunk_steps": trunk_steps,
        "steps_per_base": branch_steps,
        "losses": losses,
    }


def _check_memory(config: Config, start: Path, proxies: list[Path]) -> None:
    """Refuses teachers that do not fit beside the trunk, before hours go into what they write."""
    teachers = 0
    for proxy in map(read_config, proxies):
        half = resolve_precision(config.precision, proxy) == "bf16"
        teachers += parameter_total(proxy) * (2 if half else 4)
    tokens = config.data.max_chars // 3
    trunk = estimate_training_bytes(read_config(start), "full", config.distill.batch_size, tokens)
    require_memory(
        teachers + trunk, f"distilling the trunk from {len(proxies)} teachers at once", where="clustering.proxies",
        allowed=f"{config.experts} (one per expert) or more, as memory allows",
        fix="fewer proxies or experts, or recipe=paper, which has one teacher at a time",
    )  # fmt: skip


def _texts(config: Config, corpus: list[Window], k: int, has_trunk: bool) -> list[Window]:
    """What base k reads: with a trunk its own texts, without one all public text, as in the paper.

    A sample of another proxy is never public text: it is a message from that proxy to its own base.
    """
    own = [d for d in corpus if d.teacher == k]
    if has_trunk and own:
        return own
    return [Window(d.document, d.source, k) for d in corpus if d.source != "sampled" or d.teacher == k]


def distill(
    config: Config, start: Path, proxies: dict[int, Path], windows: list[Window], steps: int, train_all: bool,
    unit: str, out: Path, work: Path, method: Callable[..., nn.Module] = Distiller,
) -> float | None:  # fmt: skip
    """Train one dense student with the given proxies as its teachers; writes a Hugging Face checkpoint to `out`.

    Returns:
        The mean loss of the last logged steps, None without any step.
    """
    if (out / "config.json").is_file():
        return None
    settings = config.distill
    device = compute_device()
    tokenizer = load_tokenizer(start)
    student = load_model(start, "fp32")
    precision = resolve_precision(config.precision, student.config)
    nn.Module.to(student, device)
    history: list[dict[str, float]] = []
    if steps:
        vaa = settings.vaa if settings.alpha > 0 else None
        teachers = {k: Teacher(folder, tokenizer, config.precision, device) for k, folder in proxies.items()}
        weights = LossWeights(
            settings.ce_weight, settings.alpha, settings.beta, settings.chunk_weight, temperature=settings.temperature,
            sampled_ce=settings.sampled_ce,
        )  # fmt: skip
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(train_all or ".mlp." in name)
        periods = reading_periods(windows, settings.sampled_share)
        order = reading_order(
            [len(d.document.text) for d in windows], steps, settings.batch_size, config.seed, periods
        )
        with plugins.blamed("methods", method):
            history = train(
                method(student, weights, teachers, vaa, config.seed),
                [[windows[i] for i in batch] for batch in order],
                Collator(
                    tokenizer,
                    teachers,
                    config.data.prompt_loss_weight,
                    context_limit(student),
                    vaa,
                    precision,
                ),
                stage="distill",
                unit=unit,
                work=work,
                learning_rate=settings.learning_rate,
                precision=precision,
                seed=config.seed,
                checkpoint_seconds=config.checkpoint_seconds,
                end_share=effective_handover(config),
            )
    with whole_folder(out) as part:
        student.eval().save_pretrained(part)
        tokenizer.save_pretrained(part)
        facts = {
            "architecture": type(student).__name__,
            "steps": steps,
            "documents": len(windows),
            "seed": config.seed,
        }
        text = _about(unit, proxies, steps, start == out.parent / "trunk")
        write_model_card(part, unit.capitalize(), text, facts)
        if config.merge.router == "prototype" and unit != "trunk":
            # A proxy that knows no text best, as on finely mixed data, has no corner of its own: the middle of all
            # text.
            own = [d for d in windows if d.teacher in proxies] or windows
            rows = _prototype(student, tokenizer, own, config)
            save_file({"prototype": rows}, part / "prototype.safetensors")
    remove(work)
    if history:
        progress.say(f"[distill {unit}] loss {history[0]['loss']:.3f} -> {history[-1]['loss']:.3f}")
    return history[-1]["loss"] if history else None


def _about(unit: str, proxies: dict[int, Path], steps: int, from_trunk: bool) -> str:
    """What a student is, in the words of its card."""
    use = "every base starts from it" if unit == "trunk" else "its FFNs become an expert of the MoE"
    if not steps:
        return (
            f"A copy of the {'trunk' if from_trunk else 'dense model that it starts from'}, "
            f"without any step of its own: {use}."
        )
    teachers = "all proxies" if unit == "trunk" else f"proxy {min(proxies)}"
    return (
        "A dense model distilled by DeepFusion from "
        f"{teachers}{', starting from the trunk' if from_trunk else ''}: {use}."
    )


def _prototype(
    student: PreTrainedModel, tokenizer: Any, windows: list[Window], config: Config
) -> torch.Tensor:
    """Mean input of every layer's FFN over the texts of one base: fp32 [layers, hidden]."""
    inputs: dict[str, list[torch.Tensor]] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: inputs.setdefault(name, []).append(args[0].mean((0, 1)))
        )
        for name, module in student.named_modules()
        if name.endswith(".mlp")
    ]
    collate = Collator(tokenizer, {}, 1.0, context_limit(student))
    with torch.inference_mode():
        for first in range(0, min(len(windows), 64), config.distill.batch_size):
            batch = collate(windows[first : first + config.distill.batch_size])
            student.base_model(input_ids=batch["input_ids"].to(student.device))
    for hook in hooks:
        hook.remove()
    return torch.stack([torch.stack(rows).mean(0).float().cpu() for rows in inputs.values()])
