"""A control: the devices' own FFNs as experts, without distillation, as mergekit-moe makes an MoE of fine-tuned models.

It needs devices of the very class that the MoE is upcycled from, so all others are left out. The router starts
from the mean hidden state of texts that belong to each expert (mergekit's gate mode `hidden`); nothing is trained.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deepfusion.learning.corpus import build_corpus, write_corpus
from deepfusion.models.checkpoints import numbered
from deepfusion.schema import Config
from deepfusion.stages.distill import distill
from deepfusion.text.splits import make_splits


def run(config: Config, inputs: dict[str, Path], out: Path) -> dict[str, Any]:
    """In place of phase II: the proxies themselves are the bases. Writes `out`/bases/."""
    bases, work = out / "bases", out / "work"
    bases.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    proxies = numbered(inputs["proxies"])
    documents = build_corpus(config, make_splits(config), proxies, work)
    write_corpus(documents, bases / "corpus.jsonl")
    for k, proxy in enumerate(proxies):
        distill(config, proxy, {k: proxy}, documents, 0, True, f"base {k}", bases / str(k), work / str(k))
    return {"documents": len(documents)}
