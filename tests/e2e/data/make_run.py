"""Makes `run-0.1.0/`: a run folder as release 0.1.0 left it, with the data and checkpoints that it was made of.

With the source of release 0.1.0 in PYTHONPATH: `python tests/e2e/data/make_run.py`. Two devices, minuscule models;
logs and report are left out.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedTokenizerFast, Qwen3Config

from deepfusion import pipeline
from deepfusion.config import load_config

HERE = Path(__file__).parent / "run-0.1.0"
WORDS = {
    "ward": ["nurse", "patient", "fever", "dose", "rest", "scan", "blood", "heart", "gave", "took"],
    "bank": ["bond", "fund", "rate", "loan", "price", "share", "broker", "market", "sold", "bought"],
}


def make() -> None:
    """Write everything below `HERE`, to be read with `HERE` as the working directory."""
    shutil.rmtree(HERE, ignore_errors=True)
    HERE.mkdir()
    os.chdir(HERE)
    generator = random.Random(0)
    for name, words in WORDS.items():
        rows = [{"text": " ".join(generator.choices(words, k=8)), "domain": name} for _ in range(24)]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    texts = [" ".join(words) for words in WORDS.values()]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>", "</s>"]))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
    end = {"bos_token_id": 1, "eos_token_id": 1, "vocab_size": len(fast)}
    types = {
        "device": GPT2Config(n_embd=8, n_inner=16, n_layer=1, n_head=2, n_positions=64, **end),
        "base": Qwen3Config(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=4,
            intermediate_size=16, max_position_embeddings=64, **end,
        ),
    }  # fmt: skip
    for name, config in types.items():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(f"models/{name}")
        fast.save_pretrained(f"models/{name}")
    values = {
        "experts": 2,
        "devices": [{"id": name, "type": "models/device", "data": f"{name}.jsonl"} for name in WORDS],
        "jobs": 1,
        "precision": "fp32",
        "data": {"max_chars": 96, "public_fraction": 0.2},
        "device": {"steps": 4, "batch_size": 4, "types": ["models/device"]},
        "distill": {
            "base": "models/base",
            "steps": 4,
            "batch_size": 4,
            "vaa": {"stages": 1, "patches": 4, "width": 8, "heads": 2},
        },
        "tune": {"steps": 2, "batch_size": 4},
        "evaluate": {"max_documents": 4},
    }
    Path("config.yaml").write_text(yaml.safe_dump(values), "utf-8")
    pipeline.run(load_config("config.yaml"), Path("run"))
    for name in ("tensorboard", "report", ".work"):
        shutil.rmtree(f"run/{name}", ignore_errors=True)
    for name in ("log.txt", "metrics.jsonl", ".lock"):
        Path("run", name).unlink(missing_ok=True)


if __name__ == "__main__":
    make()
