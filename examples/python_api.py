"""Simulate a small federation and use its model as any other Hugging Face checkpoint: a few minutes on two CPU
cores."""

import logging
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from deepfusion import load_config, run


def main(out: Path, overrides: list[str]) -> None:
    model_folder = run(load_config(overrides=overrides), out) / "moe" / "final"
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    inputs = tokenizer("Question: Which vitamin", return_tensors="pt")
    print(tokenizer.decode(model.generate(**inputs, max_new_tokens=16)[0]))


if __name__ == "__main__":  # trainings run in worker processes, which import this file
    logging.basicConfig(format="%(message)s")
    logging.getLogger("deepfusion").setLevel(logging.INFO)  # shows the progress of the run
    main(Path("runs/api"), ["device.steps=20", "distill.steps=20", "tune.steps=20"])
