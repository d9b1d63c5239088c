"""Phase III: tune the merged MoE on public text, and beside it a control that no device has taught."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from deepfusion import families, models
from deepfusion.checkpoints import TensorReader, TensorWriter, copy_tokenizer
from deepfusion.config import Config
from deepfusion.corpus import Document, read_corpus
from deepfusion.data import reading_order
from deepfusion.distillation import Collator, Distiller, LossWeights, Teacher
from deepfusion.jobs import run_jobs
from deepfusion.metrics import context_limit
from deepfusion.training import train


def run(config: Config, inputs: dict[str, Path], out: Path) -> dict[str, Any]:
    """Writes `out`/moe/final and `out`/moe/control.

    The control is the public base, copied into every expert of the same MoE and tuned by cross-entropy on the same texts
    for the same number of steps: what the public text alone can teach.
    """
    moe = out / "moe"
    moe.mkdir(parents=True, exist_ok=True)
    proxies = {k: inputs["proxies"] / str(k) for k in range(config.experts)} if config.tune.teachers else {}
    untaught = out / "work" / "untaught"
    if not (moe / "control" / "config.json").is_file():
        _untaught(config, inputs["merged"], untaught)
    corpus = inputs["bases"] / "corpus.jsonl"
    jobs = [
        {"config": config, "start": inputs["merged"], "corpus": corpus, "proxies": proxies, "unit": "moe",
         "out": moe / "final", "work": out / "work" / "final"},
        {"config": config, "start": untaught, "corpus": corpus, "proxies": {}, "unit": "control",
         "out": moe / "control", "work": out / "work" / "control"},
    ]  # fmt: skip
    final, control = run_jobs(tune, jobs, config.jobs)
    return {"final": final, "control": control}


def tune(
    config: Config, start: Path, corpus: Path, proxies: dict[int, Path], unit: str, out: Path, work: Path
) -> dict[str, float]:
    """Tune one MoE; with `proxies` each of them teaches its own texts, without by cross-entropy alone."""
    if (out / "config.json").is_file():
        return {}
    settings = config.tune
    precision = models.resolve_precision(config.precision)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = models.load_tokenizer(start)
    student = models.load_model(start, "fp32").to(device)
    documents: list[Document] = read_corpus(corpus)
    pinned = set(families.pinned_parameters(student))
    for name, parameter in student.named_parameters():
        frozen = families.is_expert_name(name) and not settings.train_experts
        parameter.requires_grad_(not frozen and name not in pinned)
    teachers = {k: Teacher(folder, tokenizer, precision, device) for k, folder in proxies.items()}
    weights = LossWeights(
        settings.ce_weight if teachers else 1.0,
        beta=settings.beta if teachers else 0.0,
        chunk=settings.chunk_weight if teachers else 0.0,
        balance=settings.balance_weight,
        temperature=settings.temperature,
    )
    order = reading_order([len(d.example.text) for d in documents], settings.steps, settings.batch_size, config.seed + 1)
    history = train(
        Distiller(student, weights, teachers),
        [[documents[i] for i in batch] for batch in order],
        Collator(tokenizer, teachers, config.data.prompt_loss_weight, context_limit(student)),
        stage="tune",
        unit=unit,
        work=work,
        learning_rate=settings.learning_rate,
        precision=precision,
        seed=config.seed,
        checkpoint_seconds=config.checkpoint_seconds,
    )
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    student.eval().to(models.read_config(start).dtype).save_pretrained(part)
    tokenizer.save_pretrained(part)
    shutil.rmtree(out, ignore_errors=True)
    os.replace(part, out)
    shutil.rmtree(work, ignore_errors=True)
    return {key: value for key, value in history[-1].items() if key != "learning_rate"} if history else {}


def _untaught(config: Config, merged: Path, out: Path) -> None:
    """The merged MoE's layout with the untouched public base in every expert."""
    shutil.rmtree(out, ignore_errors=True)
    base = models.base_checkpoint(config.distill.base, config.family)
    layout = families.layout(config)
    reader = TensorReader(base)
    families.write_moe(layout, [reader] * config.experts, models.read_config(base), None, config.seed, out)
    copy_tokenizer(merged, out)
