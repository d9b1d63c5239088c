"""View-Aligned Attention: matching the features of teacher and student across architectures [DF eq. 7-9].

A compact model builds in its last layers what a larger one has early, so that layer j of the one does not correspond to
layer j of the other. Here the student's features of *all* blocks of layers ("stages" in the source) are mixed by
attention before they are matched with each block of the teacher. The module is used for distillation only and thrown
away.

The source does not say what a patch of a language model's features is. Ours is a span of *text*: an equal share of the
document's characters, over which either side averages the hidden states of its own tokens. So both sides see the same
words in the same patch, whatever their tokenizers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepfusion.errors import InputError


def block_ends(num_layers: int, blocks: int) -> list[int]:
    """Indices into `hidden_states` (0 = embeddings, `num_layers` = last) where each of `blocks` of layers ends.

    Raises:
        InputError: `too-many-blocks` if the model has fewer layers than blocks.
    """
    if not 1 <= blocks <= num_layers:
        raise InputError(
            f"{blocks} blocks do not fit a model of {num_layers} layers",
            where="distill.vaa.blocks",
            allowed=f"1 to {num_layers}",
            code="too-many-blocks",
        )
    return [num_layers * (block + 1) // blocks for block in range(blocks)]


def span_pooling(
    offsets: Sequence[np.ndarray], text_lengths: Sequence[int], spans: int, max_tokens: int
) -> Tensor:
    """Matrices that average a document's tokens over `spans` equal divisions of its characters.

    Args:
        offsets: integers [T, 2] a document, `[start, end)` in characters, T <= max_tokens; padding goes on the right.
        text_lengths: characters a document. Where one side is truncated, pass both the length that both sides cover.
        spans: divisions of a document.
        max_tokens: padded length.

    Returns:
        float32 [B, spans, max_tokens]; each row is proportional to the characters that span and token share, and sums
        to 1. Zero-width (special) tokens have no part in it. A span that no token touches takes the nearest token; in a
        document without any characters every span takes the first token.
    """
    padded = torch.zeros(len(offsets), max_tokens, 2)
    for row, document in enumerate(offsets):
        padded[row, : len(document)] = torch.as_tensor(np.asarray(document).reshape(-1, 2).astype(np.float32))
    starts, ends = padded[:, None].unbind(-1)  # [B, 1, T]
    edges = torch.linspace(0, 1, spans + 1) * torch.as_tensor(text_lengths, dtype=torch.float32)[:, None]
    left, right = edges[:, :-1, None], edges[:, 1:, None]  # [B, spans, 1]
    overlap = (torch.minimum(ends, right) - torch.maximum(starts, left)).clamp_min(0)

    middle = (left + right) / 2
    distance = torch.maximum(starts - middle, middle - ends).masked_fill(ends <= starts, torch.inf)
    nearest = F.one_hot(distance.argmin(-1), max_tokens).to(overlap)
    overlap = torch.where(overlap.sum(-1, keepdim=True) > 0, overlap, nearest)
    return overlap / overlap.sum(-1, keepdim=True)


class ViewAlignedAttention(nn.Module):
    """`L_FM` for one pair of student and teacher [DF eq. 7-9].

    Args:
        student_width: Ds, hidden size of the student.
        teacher_width: Dt, hidden size of the teacher.
        blocks: J.
        patches: P_q, patches of all blocks together; P_q / J spans of text a block.
        width: d, width of the attention.
        heads: attention heads.
        kernel: r, the sub-spans of a patch which the convolution C_j of a block joins.
        causal: keep patches from attending to later spans, which the student could not have seen (ours).
        normalize: scale each of the teacher's features to mean 0 and variance 1, so that the weight of this loss means
            the same for every teacher (ours); False is the plain squared error of the source.
        mode: "direct" leaves the attention out and so matches block j with block j alone, for comparison.

    Raises:
        InputError: `patches-not-divisible` or `width-not-divisible`.

    The embeddings of block and span are ours (attention alone would not know which patch is which); they start at zero,
    so that training starts from the formula of the source. As there, nothing is added around the attention.
    """

    visible: Tensor | None

    def __init__(
        self,
        student_width: int,
        teacher_width: int,
        *,
        blocks: int,
        patches: int,
        width: int,
        heads: int,
        kernel: int,
        causal: bool = False,
        normalize: bool = True,
        mode: Literal["vaa", "direct"] = "vaa",
    ) -> None:
        super().__init__()
        _require_multiple("patches", patches, "blocks", blocks)
        _require_multiple("width", width, "heads", heads)
        self.teacher_width, self.normalize, self.heads = teacher_width, normalize, heads
        self.spans = patches // blocks
        """Spans of `teacher_pool`; `student_pool` has `kernel` times as many."""
        self.patchify = nn.ModuleList(
            nn.Conv1d(student_width, width, kernel, stride=kernel) for _ in range(blocks)
        )
        self.project = nn.ModuleList(nn.Linear(width, teacher_width) for _ in range(blocks))
        self.qkv: nn.Linear | None = None
        if mode == "vaa":
            self.qkv = nn.Linear(width, 3 * width, bias=False)
            # Named so in the checkpoints of trainings that go on.
            self.stage_embedding = nn.Parameter(torch.zeros(blocks, 1, width))
            self.span_embedding = nn.Parameter(torch.zeros(self.spans, width))
        span = torch.arange(self.spans).repeat(blocks)
        self.register_buffer("visible", span[:, None] >= span if causal else None, persistent=False)

    def forward(
        self,
        student_states: Sequence[Tensor],
        student_pool: Tensor,
        teacher_states: Sequence[Tensor],
        teacher_pool: Tensor,
    ) -> Tensor:
        """`L_FM`, a scalar: the sum over blocks of the mean squared error [DF eq. 9].

        Args:
            student_states: J tensors [B, Ts, Ds].
            student_pool: [B, spans * kernel, Ts] from `span_pooling`.
            teacher_states: J tensors [B, Tt, Dt]; no gradient flows into them.
            teacher_pool: [B, spans, Tt].
        """
        pool = student_pool.to(student_states[0].dtype)
        blocks = [
            conv((pool @ states).transpose(1, 2)).transpose(1, 2)
            for conv, states in zip(self.patchify, student_states, strict=True)
        ]  # J x [B, P_q/J, d]
        if self.qkv is not None:
            blocks = self._attend(blocks, self.qkv)
        loss = student_pool.new_zeros((), dtype=torch.float32)
        for project, patches, states in zip(self.project, blocks, teacher_states, strict=True):
            target = teacher_pool.float() @ states.detach().float()
            if self.normalize:
                target = F.layer_norm(target, (self.teacher_width,))
            loss = loss + F.mse_loss(project(patches).float(), target)
        return loss

    def _attend(self, blocks: list[Tensor], to_qkv: nn.Linear) -> list[Tensor]:
        """J x [B, P_q/J, d] -> the same shapes, after attention among all P_q patches [DF eq. 8]."""
        patches = (torch.stack(blocks, 1) + self.stage_embedding + self.span_embedding).flatten(1, 2)
        qkv = to_qkv(patches).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value, self.visible)  # [B, heads, P_q, d/heads]
        return list(mixed.transpose(1, 2).flatten(2).split(self.spans, dim=1))


def _require_multiple(name: str, value: int, divisor_name: str, divisor: int) -> None:
    if value < 1 or value % divisor:
        raise InputError(
            f"{value} is not a multiple of distill.vaa.{divisor_name} ({divisor})",
            where=f"distill.vaa.{name}",
            allowed=f"{divisor}, {2 * divisor}, {3 * divisor}, ...",
            code=f"{name}-not-divisible",
        )
