"""The losses of distillation and tuning: cross-entropy, KL, chunk likelihood, load balance.

The output layer is applied here, to blocks of positions, because logits are what fills memory: at a vocabulary of 152k,
one fp32 copy for 8 x 1024 positions is 5 GB. The gradients of a block are taken at once, in the forward pass, and its
logits dropped: so the output layer is computed only once, and peak memory depends on the block size, not on the number
of positions (the idea of fused linear cross-entropy, Hsu et al. 2024, arXiv 2410.10989). For that the weights of all
parts of the loss have to be known beforehand: only `loss` carries gradients. `L_FM` is in `deepfusion.learning.vaa`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from deepfusion.learning.align import AlignedBatch, SharedVocabulary

Scores = Literal["softmax", "sigmoid"]
BLOCK_ELEMENTS = 2**22
"""Logits held at once, per copy: 16 MiB in fp32."""


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
    """Scalars: `loss`, which alone has a gradient, and its parts, averaged with the positions' weights; and the
    log-probability of every target, float32 [N].
    """

    loss: Tensor
    ce: Tensor
    kl: Tensor
    accuracy: Tensor
    log_probs: Tensor


class TokenLosses(NamedTuple):
    """Scalar float32 tensors: `loss`, which alone has a gradient, and its parts `L_CE`, `L_KL` [DF eq. 10], chunk
    likelihood, and the token accuracy.
    """

    loss: Tensor
    ce: Tensor
    kl: Tensor
    chunk: Tensor
    accuracy: Tensor


class Coefficients(NamedTuple):
    """What `loss` is made of: `ce L_CE + kl L_KL + chunk` times the chunk likelihood."""

    ce: float = 1.0
    kl: float = 0.0
    chunk: float = 0.0


def distillation_losses(
    batch: AlignedBatch,
    student: Projection,
    student_ids: Tensor,
    coefficients: Coefficients,
    *,
    teacher: Projection | None = None,
    teacher_ids: Tensor | None = None,
    vocabulary: SharedVocabulary | None = None,
    temperature: float = 1.0,
) -> TokenLosses:
    """All losses on the output distributions for one batch; without a teacher, `kl` and `chunk` are 0, and so is
    `chunk` where its coefficient is.

    Args:
        batch: which positions count and how the two sides correspond.
        student: hidden [B, Ts, Ds].
        student_ids: int64 [B, Ts].
        coefficients: the weights of the parts.
        teacher: hidden [B, Tt, Dt]; no gradient flows into it. The next two are required with it.
        teacher_ids: int64 [B, Tt].
        vocabulary: what the two vocabularies share.
        temperature: softens both distributions of `kl` and both probabilities of `chunk`.
    """
    positions, weights = batch.student_index, batch.weights
    targets = student_ids.flatten()[positions + 1]
    if teacher is None:
        found = cross_entropy_and_kl(student, positions, targets, weights, coefficients)
        return TokenLosses(found.loss, found.ce, found.kl, torch.zeros_like(found.kl), found.accuracy)
    assert teacher_ids is not None
    assert vocabulary is not None
    chunk, pull = torch.zeros((), device=positions.device), None
    if coefficients.chunk and len(batch.chunk_weights):  # they take a pass of their own
        at = batch.chunk_teacher_index
        theirs = _log_probs(teacher, at, teacher_ids.flatten()[at + 1])
        inside = (batch.student_chunk >= 0).nonzero().squeeze(-1)
        ours = _log_probs(student, positions[inside], targets[inside])
        ours = torch.zeros_like(weights).index_copy_(0, inside, ours)
        with torch.enable_grad():
            chunk = chunk_likelihood(batch, ours.requires_grad_(), theirs, temperature)
            (pull,) = torch.autograd.grad(coefficients.chunk * chunk, ours)
        chunk = chunk.detach()
    comparison = Comparison(teacher, batch.teacher_index, vocabulary, temperature)
    found = cross_entropy_and_kl(
        student, positions, targets, weights, coefficients, comparison=comparison, pull=pull
    )
    loss = found.loss + coefficients.chunk * chunk
    return TokenLosses(loss, found.ce, found.kl, chunk, found.accuracy)


def _log_probs(model: Projection, positions: Tensor, targets: Tensor) -> Tensor:
    """float32 [N], without a gradient."""
    with torch.no_grad():
        return cross_entropy_and_kl(model, positions, targets, torch.ones_like(targets).float()).log_probs


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
    coefficients: Coefficients = Coefficients(),  # noqa: B008 (a tuple cannot be changed)
    *,
    comparison: Comparison | None = None,
    pull: Tensor | None = None,
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
        coefficients: `loss` is `ce L_CE + kl L_KL` with the first two of them.
        comparison: the teacher's side; None for cross-entropy alone, `kl` is then 0.
        pull: float32 [N], the derivative by `log_probs` of a loss that the caller adds: its gradient is added here.
        block_elements: logits in a block.
    """
    compared = weights if comparison is None else weights * (comparison.positions >= 0)
    block = _Block(
        coefficients.ce / _total(weights), coefficients.kl / _total(compared), comparison, len(student.weight)
    )
    if not torch.is_grad_enabled():
        bias = None if student.bias is None else student.bias.detach()
        student = Projection(student.hidden.detach(), student.weight.detach(), bias)
    rows = [targets, weights, torch.zeros_like(weights) if pull is None else pull]
    if comparison is not None:
        rows.append(comparison.positions)
    hidden = student.hidden.flatten(0, -2).index_select(0, positions)
    loss, log_probs, correct, kl = _Blockwise.apply(
        hidden, student.weight, student.bias, block, rows, max(block_elements // block.width, 1)
    )
    return PositionLosses(
        loss=loss,
        ce=-(log_probs * weights).sum() / _total(weights),
        kl=(kl * weights).sum() / _total(compared),
        accuracy=(correct * weights).sum() / _total(weights),
        log_probs=log_probs,
    )


class _Block:
    """The loss of a block of positions and its gradient by their logits.

    Args:
        ce, kl: float32 scalars, by which a position's weight is multiplied.
        size: of the student's vocabulary.
    """

    def __init__(self, ce: Tensor, kl: Tensor, comparison: Comparison | None, size: int) -> None:
        self.ce, self.kl, self.comparison = ce, kl, comparison
        self.width = size
        if comparison is not None:
            theirs = len(comparison.teacher.weight)
            self.width = max(size, theirs)
            self.columns, self.their_columns = comparable_columns(comparison.vocabulary, size, theirs)

    def __call__(
        self, differentiate: bool, logits: Tensor, targets: Tensor, weights: Tensor, pull: Tensor,
        teacher_positions: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor], Tensor | None]:  # fmt: skip
        """The loss, a scalar without what `pull` belongs to; log-probability of each target, whether it would have been
        chosen, and KL, each float32 [n]; and the gradient, float32 [n, V], where it is wanted.
        """
        log_p = logits.float().log_softmax(-1)
        log_probs = log_p.gather(-1, targets[:, None]).squeeze(-1)
        correct = (log_p.argmax(-1) == targets).float()
        weights_ce, kl = self.ce * weights, torch.zeros_like(weights)
        loss, on_target = -(weights_ce * log_probs).sum(), weights_ce - pull
        found = log_probs, correct, kl
        if self.comparison is None or teacher_positions is None:
            return loss, found, _gradient(log_p, on_target, targets, on_target) if differentiate else None
        temperature = self.comparison.temperature
        both = (teacher_positions >= 0).nonzero().squeeze(-1)
        every = len(both) == len(targets)
        ours = log_p if every else log_p[both]
        asked = self.comparison.teacher.logits(teacher_positions[both])
        if temperature != 1:
            ours, asked = (ours / temperature).log_softmax(-1), asked / temperature
        picked, log_q = self.columns.pick(ours), self.their_columns.log_probs(asked)
        del asked
        q = log_q.exp()
        divergence = torch.linalg.vecdot(q, log_q.sub_(picked)) * temperature**2
        kl.index_copy_(0, both, divergence)
        weights_kl = (self.kl * weights)[both]
        loss = loss + (weights_kl * divergence).sum()
        if not differentiate:
            return loss, found, None
        # The derivative of KL by the logits: what the student gives to each token, less what the teacher does.
        theirs = self.columns.spread(q, picked, ours).mul_((temperature * weights_kl)[:, None])
        if temperature == 1:
            gradient = _gradient(log_p, on_target.index_add(0, both, weights_kl), targets, on_target)
        else:
            gradient = _gradient(log_p, on_target, targets, on_target)
            gradient.index_add_(0, both, ours.exp_().mul_((temperature * weights_kl)[:, None]))
        compared = gradient[:, : theirs.shape[-1]]
        if every:
            compared.sub_(theirs)
        else:
            compared.index_add_(0, both, theirs, alpha=-1)
        return loss, found, gradient


def _gradient(log_p: Tensor, on_all: Tensor, targets: Tensor, on_target: Tensor) -> Tensor:
    """`on_all` times the probabilities, less `on_target` at the targets, in the memory of `log_p` [n, V]."""
    return log_p.exp_().mul_(on_all[:, None]).scatter_add_(-1, targets[:, None], -on_target[:, None])


class _Blockwise(torch.autograd.Function):
    """Losses of positions, a block at a time: `block` on the logits `hidden @ weight.T + bias` of each.

    The matrix products have the type of autocast where it is on. Gradients of the output layer are summed over blocks
    in its own type.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, block: _Block, rows: list[Tensor], size: int
    ) -> tuple[Tensor, ...]:  # fmt: skip
        kind = hidden.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        matrix, shift = (
            weight.to(autocast or weight.dtype),
            None if bias is None else bias.to(autocast or bias.dtype),
        )
        gradients = [
            torch.zeros_like(tensor) if tensor is not None and wanted else None
            for tensor, wanted in zip((hidden, weight, bias), ctx.needs_input_grad[:3], strict=True)
        ]
        loss, parts = torch.zeros((), device=hidden.device), []
        with torch.autocast(kind, enabled=False):
            for start in range(0, len(hidden), size):
                own = hidden[start : start + size].to(matrix.dtype)
                logits = F.linear(own, matrix, shift)
                part, found, gradient = block(
                    any(ctx.needs_input_grad), logits, *(row[start : start + size] for row in rows)
                )
                loss += part
                parts.append(found)
                if gradient is None:
                    continue
                gradient = gradient.to(matrix.dtype)
                if gradients[0] is not None:
                    gradients[0][start : start + size] = gradient @ matrix
                if gradients[1] is not None and gradients[1].dtype == own.dtype:
                    gradients[1].addmm_(gradient.T, own)
                elif gradients[1] is not None:
                    gradients[1] += gradient.T @ own
                if gradients[2] is not None:
                    gradients[2] += gradient.sum(0)
        empty = torch.zeros(0, device=hidden.device)
        rest = [torch.cat([empty, *part]) for part in zip(*parts, strict=True)] if parts else [empty] * 3
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(*rest)
        return loss, *rest

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [None if saved is None else saved.mul_(upstream[0]) for saved in ctx.saved_tensors]
        return *gradients, None, None, None


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

    def spread(self, q: Tensor, picked: Tensor, log_p: Tensor) -> Tensor:
        """A distribution over `pick`'s columns as one over all, [n, V], or over the first ones that are picked: of the
        bucket each column gets its share in `log_p`, of which `picked` was made.
        """
        if isinstance(self.shared, slice):
            return q
        spread = torch.zeros_like(log_p).index_copy_(-1, self.shared, q[:, : len(self.shared)])
        if self.others is None:
            return spread
        inside = (log_p.index_select(-1, self.others) - picked[:, -1:]).exp_().mul_(q[:, -1:])
        return spread.index_copy_(-1, self.others, inside)


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


def _total(weights: Tensor) -> Tensor:
    """Divides a weighted sum into a weighted mean, which is 0 where nothing counts."""
    return weights.sum().clamp_min(torch.finfo(torch.float32).tiny)


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
    return (divergence * batch.chunk_weights).sum() / _total(batch.chunk_weights)


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
