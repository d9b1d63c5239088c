"""The upper bound: the same MoE trained on the union of all private text, as if it could be collected.

[DF] trains it with DeepSpeed-MoE. Here it is the product's own tune stage with all weights trained, on private in
place of public text. It is a bound only where it has converged, so its steps have to be chosen on held-out text
and are part of every result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deepfusion import __version__
from deepfusion.folders import bind
from deepfusion.inputs import request
from deepfusion.learning.corpus import Window, write_corpus
from deepfusion.learning.order import training_steps
from deepfusion.schema import Config
from deepfusion.stages.tune import tune
from deepfusion.text.splits import make_splits
from deepfusion.text.windows import cut_windows


def run(config: Config, inputs: dict[str, Path], out: Path) -> dict[str, Any]:
    """Writes `out`/moe/final.

    Args:
        config: `tune` says how it is trained, with at most `device.epochs` passes over the text;
            `tune.train_experts` should be on.
        inputs: `start`, the MoE of untouched public bases.

    Returns:
        {"documents" (windows of private text), "steps"} and the last logged losses.
    """
    bind(out, request(config, inputs["start"], __version__, __name__), out / "moe", out / "work")
    splits = make_splits(config)
    windows = [
        Window(piece, "private")
        for private in splits.private.values()
        for document in private
        for piece in cut_windows(document, config.data.max_chars)
    ]
    steps = training_steps(config.tune.steps, config.device.epochs, len(windows), config.tune.batch_size)
    config = config.model_copy(update={"tune": config.tune.model_copy(update={"steps": steps})})
    (out / "moe").mkdir(parents=True, exist_ok=True)
    corpus = out / "private.jsonl"
    write_corpus(windows, corpus)
    losses = tune(
        config, inputs["start"], corpus, {}, True, "centralized", out / "moe" / "final", out / "work"
    )
    corpus.unlink()
    return {"documents": len(windows), "steps": steps, **losses}
