"""Simulate a small federation and use its model as any other Hugging Face checkpoint: a few minutes on two CPU
cores."""

from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from deepfusion import pipeline
from deepfusion.config import load_config


def main(run: Path, overrides: list[str]) -> None:
    pipeline.run(load_config(overrides=overrides), run)
    model = AutoModelForCausalLM.from_pretrained(run / "moe" / "final")
    tokenizer = AutoTokenizer.from_pretrained(run / "moe" / "final")
    inputs = tokenizer("Question: Which vitamin", return_tensors="pt")
    print(tokenizer.decode(model.generate(**inputs, max_new_tokens=16)[0]))


if __name__ == "__main__":  # trainings run in worker processes, which import this file
    main(Path("runs/api"), ["device.steps=20", "distill.steps=20", "tune.steps=20"])
