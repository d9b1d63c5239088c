"""An own clustering, averaging rule and distillation method in one run, without a fork: a few minutes on two cores."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deepfusion import pipeline, plugins
from deepfusion.config import load_config
from deepfusion.learning.distillation import Distiller, LossWeights
from deepfusion.schema import Config
from deepfusion.stages.proxy import Average


def along_first(embeddings: np.ndarray, clusters: int, config: Config) -> np.ndarray:
    """Equal groups along the first number of the embeddings [models, size]: the cluster of each model."""
    rank = embeddings[:, 0].argsort().argsort()
    return rank * clusters // len(embeddings)


def median(tensors: Iterable[torch.Tensor], weights: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
    """One tensor of all members of a cluster, which come one after the other."""
    return torch.stack([tensor.float() for tensor in tensors]).median(0).values.to(dtype)


class Calm(Distiller):
    """A student that follows its teachers half as much."""

    def __init__(self, student: Any, weights: LossWeights, *args: Any) -> None:
        super().__init__(student, replace(weights, beta=weights.beta / 2), *args)


# At the top level: worker processes import this file too.
plugins.register("clusterings", "along-first", along_first)
plugins.register("averages", "median", Average(lambda entries: [1.0] * len(entries), median))
plugins.register("methods", "calm", Calm)


def main(run: Path, overrides: list[str]) -> None:
    chosen = ["clustering.assignment=along-first", "clustering.average=median", "distill.method=calm"]
    pipeline.run(load_config(overrides=[*chosen, *overrides]), run)


if __name__ == "__main__":
    main(Path("runs/own"), ["device.steps=20", "distill.steps=20", "tune.steps=20"])
