"""Phase III: tune the merged MoE on public text, and beside it a control that no device has taught."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from deepfusion.families.base import is_expert_name, pinned_parameters
from deepfusion.folders import remove, whole_folder
from deepfusion.jobs import run_jobs
from deepfusion.learning.corpus import read_corpus, reading_periods
from deepfusion.learning.distillation import Collator, Distiller, LossWeights, Teacher
from deepfusion.learning.order import reading_order
from deepfusion.learning.training import train
from deepfusion.models.architecture import read_config
from deepfusion.models.checkpoints import numbered
from deepfusion.models.loading import (
    compute_device,
    context_limit,
    load_model,
    load_tokenizer,
    resolve_precision,
)
from deepfusion.report.artefacts import write_final_card, write_model_card
from deepfusion.schema import Config, effective_handover


def run(config: Config, inputs: dict[str, Path], out: Path) -> dict[str, Any]:
    """Writes `out`/moe/final and, unless `tune.control` is off, `out`/moe/control.

    The control is the same MoE with the untouched public base in every expert, tuned by cross-entropy for the same
    number of steps on the same public text: what the server could do without the devices. Samples of the proxies
    hold their knowledge, so it never reads those; where there is no other text it stays untuned.
    """
    moe = out / "moe"
    moe.mkdir(parents=True, exist_ok=True)
    proxies = dict(enumerate(numbered(inputs["proxies"]))) if config.tune.teachers else {}
    corpus = inputs["bases"] / "corpus.jsonl"
    start_share = effective_handover(config) or 1.0
    jobs = [
        {"config": config, "start": inputs["merged"], "corpus": corpus, "proxies": proxies, "samples": True,
         "unit": "moe", "out": moe / "final", "work": out / "work" / "final", "start_share": start_share},
        {"config": config, "start": inputs["untaught"], "corpus": corpus, "proxies": {}, "samples": False,
         "unit": "control", "out": moe / "control", "work": out / "work" / "control"},
    ]  # fmt: skip
    names = ("final", "control") if config.tune.control else ("final",)
    summaries = run_jobs(tune, jobs[: len(names)], config.jobs)
    write_final_card(config, inputs["run"], moe / "final")
    if not config.tune.control:
        return {"final": summaries[0]}
    return dict(zip(names, summaries, strict=True))


def tune(
    config: Config,
    start: Path,
    corpus: Path,
    proxies: dict[int, Path],
    samples: bool,
    unit: str,
    out: Path,
    work: Path,
    start_share: float = 1.0,
) -> dict[str, float]:
    """Tune one MoE; with `proxies` each of them teaches its own texts, without by cross-entropy alone.

    Args:
        samples: whether texts sampled from the proxies are read.
        start_share: of `tune.learning_rate`, the peak of this training.
    """
    if (out / "config.json").is_file():
        return {}
    settings = config.tune
    device = compute_device()
    tokenizer = load_tokenizer(start)
    student = load_model(start, "fp32")
    precision = resolve_precision(config.precision, student.config)
    torch.nn.Module.to(student, device)
    windows = [d for d in read_corpus(corpus) if samples or d.source != "sampled"]
    steps = settings.steps if windows else 0
    pinned = set(pinned_parameters(student))
    for name, parameter in student.named_parameters():
        frozen = is_expert_name(name) and not settings.train_experts
        parameter.requires_grad_(not frozen and name not in pinned)
    teachers = {k: Teacher(folder, tokenizer, config.precision, device) for k, folder in proxies.items()}
    weights = LossWeights(
        settings.ce_weight if teachers else 1.0,
        beta=settings.beta if teachers else 0.0,
        chunk=settings.chunk_weight if teachers else 0.0,
        balance=settings.balance_weight,
        temperature=settings.temperature,
        sampled_ce=config.distill.sampled_ce,
    )
    lengths, periods = (
        [len(d.document.text) for d in windows],
        reading_periods(windows, config.distill.sampled_share),
    )
    order = reading_order(lengths, steps, settings.batch_size, config.seed + 1, periods) if steps else []
    history = train(
        Distiller(student, weights, teachers),
        [[windows[i] for i in batch] for batch in order],
        Collator(
            tokenizer, teachers, config.data.prompt_loss_weight, context_limit(student), precision=precision
        ),
        stage="tune",
        unit=unit,
        work=work,
        learning_rate=start_share * settings.learning_rate,
        precision=precision,
        seed=config.seed,
        checkpoint_seconds=config.checkpoint_seconds,
    )
    with whole_folder(out) as part:
        student.eval().to(read_config(start).dtype).save_pretrained(part)
        tokenizer.save_pretrained(part)
        if unit == "control":  # the card of the MoE tells of the whole run
            facts = {
                "public documents without samples of the proxies": len(windows),
                "steps": steps,
                "seed": config.seed,
            }
            write_model_card(
                part,
                "Control",
                "The same MoE with the public base as every expert; no device taught it.",
                facts,
            )
    remove(work)
    return {key: value for key, value in history[-1].items() if key != "learning_rate"} if history else {}
