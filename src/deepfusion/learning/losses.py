"""The losses of distillation and tuning: cross-entropy, KL, chunk likelihood, load balance.

The output layer is applied here, to blocks of positions, because logits are what fills memory: at a vocabulary of 152k,
one fp32 copy for 8 x 1024 positions is 5 GB. A block's logits are dropped and computed again in the backward pass, so
peak memory depends on the block size, not on the number of positions. `L_FM` is in `deepfusion.vaa`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from deepfusion.learning.align import AlignedBatch, SharedVocabulary

Scores = Literal["softmax", "sigmoid"]
BLOCK_ELEMENTS = 2**23
"""Logits held at once, per copy: 32 MiB in fp32."""


class Projection(NamedTuple):
    """Final hidden states and the output layer that turns them into logits `hidden @ weight.T + bias`.

    Shapes: hidden [..., D], weight [V, D], bias [V] or None. V may be padded beyond the true vocabulary.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None

    def logits(self, positions: Tensor) -> Tensor:
        """float32 [n, V] at flat `positions`, int64 [n]."""
        hidden = self.hidden.flatten(0, -2).index_select(0, positions)
        return F.linear(hidden, self.weight, self.bias).float()


class PositionLosses(NamedTuple):
    """Scalars averaged with the positions' weights, and the log-probability of every target, float32 [N]."""

    ce: Tensor
    kl: Tensor
    accuracy: Tensor
    log_probs: Tensor


class TokenLosses(NamedTuple):
    """Scalar float32 tensors: `L_CE`, `L_KL` [DF eq. 10], chunk likelihood, token accuracy (no gradient)."""

    ce: Tensor
    kl: Tensor
    chunk: Tensor
    accuracy: Tensor


def distillation_losses(
    batch: AlignedBatch,
    student: Projection,
    student_ids: Tensor,
    *,
    teacher: Projection | None = None,
    teacher_ids: Tensor | None = None,
    vocabulary: SharedVocabulary | None = None,
    temperature: float = 1.0,
) -> TokenLosses:
    """All losses on the output distributions for one batch; without a teacher, `kl` and `chunk` are 0.

    Args:
        batch: which positions count and how the two sides correspond.
        student: hidden [B, Ts, Ds].
        student_ids: int64 [B, Ts].
        teacher: hidden [B, Tt, Dt]; no gradient flows into it. The next two are required with it.
        teacher_ids: int64 [B, Tt].
        vocabulary: what the two vocabularies share.
        temperature: softens both distributions of `kl` and both probabilities of `chunk`.
    """
    targets = student_ids.flatten()[batch.student_index + 1]
    if teacher is None:
        ce, kl, accuracy, _ = cross_entropy_and_kl(student, batch.student_index, targets, batch.weights)
        return TokenLosses(ce, kl, torch.zeros_like(kl), accuracy)
    assert teacher_ids is not None
    assert vocabulary is not None
    comparison = Comparison(teacher, batch.teacher_index, vocabulary, temperature)
    ce, kl, accuracy, log_probs = cross_entropy_and_kl(
        student, batch.student_index, targets, batch.weights, comparison=comparison
    )
    if not len(batch.chunk_weights):
        return TokenLosses(ce, kl, torch.zeros_like(kl), accuracy)
    with torch.no_grad():
        at = batch.chunk_teacher_index
        teacher_log_probs = cross_entropy_and_kl(
            teacher, at, teacher_ids.flatten()[at + 1], torch.ones_like(at, dtype=torch.float32)
        ).log_probs
    return TokenLosses(ce, kl, chunk_likelihood(batch, log_probs, teacher_log_probs, temperature), accuracy)


class Comparison(NamedTuple):
    """What the student's distributions are compared with.

    Attributes:
        teacher: hidden states and output layer.
        positions: int64 [N], flat positions in `teacher.hidden`; -1 where there is nothing to compare.
        vocabulary: the ids to compare.
        temperature: softens both sides.
    """

    teacher: Projection
    positions: Tensor
    vocabulary: SharedVocabulary
    temperature: float = 1.0


def cross_entropy_and_kl(
    student: Projection,
    positions: Tensor,
    targets: Tensor,
    weights: Tensor,
    *,
    comparison: Comparison | None = None,
    block_elements: int = BLOCK_ELEMENTS,
) -> PositionLosses:
    """Next-token cross-entropy, and `KL(P_teacher || P_student)` times temperature squared [DF eq. 10], in one pass.

    With the same tokenizer this is the plain KL; else the KL over the shared tokens and one bucket for all others.
    Both are in nats, and at temperature 1 both come from one log-softmax of the student's logits.

    Args:
        student: hidden states and output layer; gradients flow into all of it.
        positions: int64 [N], flat positions in `student.hidden`.
        targets: int64 [N], the ids that these positions should predict.
        weights: float32 [N], >= 0.
        comparison: the teacher's side; None for cross-entropy alone, `kl` is then 0.
        block_elements: logits in a block.
    """
    widths = [len(student.weight)] + ([len(comparison.teacher.weight)] if comparison else [])
    size = max(block_elements // max(widths), 1)
    hidden = student.hidden.flatten(0, -2).index_select(0, positions)
    rows = [tensor.split(size) for tensor in (hidden, targets, weights)]
    if comparison is None:
        block: Callable = partial(_block, student)
    else:
        columns = comparable_columns(comparison.vocabulary, *widths)
        block = partial(_block, student, comparison=comparison, columns=columns)
        rows.append(comparison.positions.split(size))

    blocks = list(zip(*rows, strict=True))
    if len(blocks) > 1 and torch.is_grad_enabled():
        # A single block is within the memory limit as it is: nothing to gain from computing it twice.
        block = partial(checkpoint, block, use_reentrant=False, preserve_rng_state=False)
    parts, correct, kl = zip(*(block(*tensors) for tensors in blocks), strict=True)
    log_probs = torch.cat(parts)
    compared = weights if comparison is None else weights * (comparison.positions >= 0)
    return PositionLosses(
        ce=-_ratio((log_probs * weights).sum(), weights),
        kl=_ratio(torch.stack(kl).sum(), compared),
        accuracy=_ratio(torch.stack(correct).sum(), weights),
        log_probs=log_probs,
    )


def _block(
    student: Projection,
    hidden: Tensor,
    targets: Tensor,
    weights: Tensor,
    teacher_positions: Tensor | None = None,
    *,
    comparison: Comparison | None = None,
    columns: tuple[Columns, Columns] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of each target [n], and the weighted sums of correct predictions and of KL."""
    log_p = F.linear(hidden, student.weight, student.bias).float().log_softmax(-1)
    log_probs = log_p.gather(-1, targets[:, None]).squeeze(-1)
    correct = ((log_p.detach().argmax(-1) == targets) * weights).sum()
    if comparison is None or columns is None or teacher_positions is None:
        return log_probs, correct, correct.new_zeros(())
    both = (teacher_positions >= 0).nonzero().squeeze(-1)
    if len(both) < len(targets):
        log_p, weights, teacher_positions = log_p[both], weights[both], teacher_positions[both]
    with torch.no_grad():
        log_q = columns[1].log_probs(comparison.teacher.logits(teacher_positions) / comparison.temperature)
    if comparison.temperature != 1:
        log_p = (log_p / comparison.temperature).log_softmax(-1)
    kl = F.kl_div(columns[0].pick(log_p), log_q, reduction="none", log_target=True).sum(-1)
    return log_probs, correct, (kl * weights).sum() * comparison.temperature**2


class Columns(NamedTuple):
    """The columns of one model's [n, V] logits that are compared, in an order common to both models.

    shared: S columns, as ids or as a slice; others: the columns of the "other" bucket, None for no bucket.
    """

    shared: Tensor | slice
    others: Tensor | None

    def pick(self, log_p: Tensor) -> Tensor:
        """[n, V] -> [n, S], plus one column for the bucket if there is one."""
        shared = (
            log_p[:, self.shared] if isinstance(self.shared, slice) else log_p.index_select(-1, self.shared)
        )
        if self.others is None:
            return shared
        # Summed from its own columns, as 1 - sum(shared) loses all digits when the shared mass is close to 1.
        return torch.cat([shared, log_p.index_select(-1, self.others).logsumexp(-1, keepdim=True)], -1)

    def log_probs(self, logits: Tensor) -> Tensor:
        """The distribution over `pick`'s columns: they sum to 1."""
        return self.pick(logits).log_softmax(-1)


def comparable_columns(
    vocabulary: SharedVocabulary, student_size: int, teacher_size: int
) -> tuple[Columns, Columns]:
    """The columns of student and teacher to compare.

    Where one side has nothing but shared tokens there is no bucket: the teacher is renormalised over the shared ones,
    and what the student gives to any others counts against it. So do padded columns of identical vocabularies.
    """
    ids = vocabulary.student_ids, vocabulary.teacher_ids
    if vocabulary.identical:
        same = Columns(slice(len(ids[0])), None)
        return same, same
    student_others, teacher_others = _complement(ids[0], student_size), _complement(ids[1], teacher_size)
    if not len(student_others) or not len(teacher_others):
        return Columns(ids[0], None), Columns(ids[1], None)
    return Columns(ids[0], student_others), Columns(ids[1], teacher_others)


def _complement(ids: Tensor, size: int) -> Tensor:
    """The ids below `size` that are not in `ids`."""
    return (
        torch.ones(size, dtype=torch.bool, device=ids.device).index_fill_(0, ids, False).nonzero().squeeze(-1)
    )


def _ratio(total: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean from a weighted sum; 0, with its gradient, where nothing counts."""
    return total / weights.sum().clamp_min(torch.finfo(torch.float32).tiny)


def chunk_likelihood(
    batch: AlignedBatch, student_log_probs: Tensor, teacher_log_probs: Tensor, temperature: float = 1.0
) -> Tensor:
    """Approximate likelihood matching (Minixhofer, Vulić & Ponti 2025): both find each chunk of text as likely.

    For a chunk with probability p (the product of its tokens'), `KL(Bernoulli(p_T^(1/t)) || Bernoulli(p_S^(1/t)))`.

    Args:
        student_log_probs: [N], of the targets at `batch.student_index`.
        teacher_log_probs: [M], of the targets at `batch.chunk_teacher_index`.
        temperature: t; higher values tell apart chunks of small probability.

    Returns:
        The weighted mean over chunks, a scalar in nats; 0 without chunks.
    """
    inside = (batch.student_chunk >= 0).nonzero().squeeze(-1)
    empty = torch.zeros_like(batch.chunk_weights)
    student = empty.index_add(0, batch.student_chunk[inside], student_log_probs[inside]) / temperature
    teacher = empty.index_add(0, batch.teacher_chunk, teacher_log_probs) / temperature
    # log(1-p) and its slope are finite only below p = 1; fp32 cannot tell p > 1 - 1e-6 from 1 well enough.
    student, teacher = student.clamp_max(-1e-6), teacher.clamp_max(-1e-6)
    student_not, teacher_not = _log1mexp(student), _log1mexp(teacher)
    divergence = teacher.exp() * (teacher - student) + teacher_not.exp() * (teacher_not - student_not)
    return _ratio((divergence * batch.chunk_weights).sum(), batch.chunk_weights)


def _log1mexp(x: Tensor) -> Tensor:
    """`log(1 - exp(x))` for x < 0, accurate at both ends (Maechler 2012)."""
    near = x > -0.6931471805599453
    # Each branch sees a harmless value where the other is taken: the gradient of an unused infinity would be nan.
    return torch.where(
        near, (-torch.expm1(x.masked_fill(~near, -1.0))).log(), torch.log1p(-x.masked_fill(near, -1.0).exp())
    )


def router_shares(logits: Tensor, scores: Scores) -> Tensor:
    """What a router makes of its logits [tokens, experts]: shares of each token, which sum to 1, same shape."""
    return logits.softmax(-1) if scores == "softmax" else F.normalize(logits.sigmoid(), p=1, dim=-1)


def load_balance(
    router_logits: Sequence[Tensor],
    top_k: int,
    mask: Tensor | None = None,
    scores: Scores = "softmax",
) -> Tensor:
    """Auxiliary loss of Switch Transformer / ST-MoE, of each layer by itself, averaged over layers; 1 = balanced.

    Pooling the layers first, as the stock implementation does, calls it balanced when every layer collapses on a
    different expert.

    Args:
        router_logits: one [tokens, experts] a layer.
        top_k: experts a token is sent to.
        mask: [tokens] or [B, T], 0 for padding; None if all tokens count.
        scores: how the router turns logits into scores.
    """
    losses = []
    for layer in router_logits:
        logits = layer.float()
        tokens, experts = logits.shape
        weights = logits.new_ones(tokens) if mask is None else mask.flatten().to(logits)
        shares = router_shares(logits, scores)
        chosen = torch.zeros_like(shares).scatter_(-1, logits.topk(top_k, dim=-1).indices, 1.0 / top_k)
        total = weights.sum().clamp_min(1)
        losses.append(experts * ((weights @ chosen / total) * (weights @ shares / total)).sum())
    return torch.stack(losses).mean()
