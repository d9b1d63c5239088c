"""What the baselines that replace phase II share: the stage around them, the teacher's side, losses in blocks of
positions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deepfusion.learning.distillation import Group, Teacher
from deepfusion.learning.losses import BLOCK_ELEMENTS, Coefficients, Projection
from deepfusion.schema import Config
from deepfusion.stages import distill


def in_blocks(block: Callable[..., tuple[Tensor, ...]], width: int, *rows: Tensor) -> tuple[Tensor, ...]:
    """`block(*rows)`, a few rows at a time, so that no more than `BLOCK_ELEMENTS` logits are held at once.

    Args:
        block: takes and returns tensors with one entry per row.
        width: logits that `block` holds per row.
        rows: tensors [N, ...].

    Returns:
        What `block` returns for all N rows. Where there are several blocks, each is computed again in the backward
        pass.
    """
    blocks = list(zip(*(tensor.split(max(BLOCK_ELEMENTS // width, 1)) for tensor in rows), strict=True))
    if len(blocks) > 1 and torch.is_grad_enabled():
        block = partial(checkpoint, block, use_reentrant=False, preserve_rng_state=False)
    return tuple(torch.cat(parts) for parts in zip(*(block(*tensors) for tensors in blocks), strict=True))


@torch.no_grad()
def teacher_output(teacher: Teacher, group: Group, device: torch.device) -> tuple[Projection, Tensor, Tensor]:
    """A teacher's final states for its texts with its output layer, and its ids and mask, int64 [B, Tt], on
    `device`."""
    assert group.teacher_ids is not None
    assert group.teacher_mask is not None
    ids, mask = group.teacher_ids.to(device), group.teacher_mask.to(device)
    states = teacher.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    head = teacher.model.get_output_embeddings()
    return Projection(states, head.weight, getattr(head, "bias", None)), ids, mask


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """`sum(values * weights) / sum(weights)`, a scalar; 0, with its gradient, where nothing counts."""
    return (values * weights).sum() / weights.sum().clamp_min(torch.finfo(torch.float32).tiny)


def weighed(found: dict[str, Tensor], coefficients: Coefficients) -> Tensor:
    """The loss of which `found` holds the parts."""
    return sum(weight * found[part] for part, weight in coefficients._asdict().items())


def distill_with(
    method: Callable[..., nn.Module], config: Config, inputs: dict[str, Path], out: Path
) -> dict[str, Any]:
    """`stages.distill.run` with `method` in place of the Distiller, without what is DeepFusion's alone: features,
    chunks.
    """
    alone = config.distill.model_copy(update={"alpha": 0.0, "chunk_weight": 0.0})
    return distill.run(config.model_copy(update={"distill": alone}), inputs, out, method)
