"""The losses against naive implementations that hold all logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from deepfusion.learning.align import Alignment, SharedVocabulary, collate, identity_alignment
from deepfusion.learning.losses import (
    Coefficients,
    Comparison,
    PositionLosses,
    Projection,
    chunk_likelihood,
    cross_entropy_and_kl,
    distillation_losses,
    load_balance,
)

N, WIDTH, VOCAB, TEACHER_VOCAB = 37, 16, 50, 40
MANY_BLOCKS = 5 * VOCAB


def identical(size: int) -> SharedVocabulary:
    return SharedVocabulary(torch.arange(size), torch.arange(size), identical=True)


def case(
    seed: int, scale: float = 1.0
) -> tuple[Projection, Projection, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Student, teacher, positions, targets, weights, teacher positions."""
    g = torch.Generator().manual_seed(seed)
    student = Projection(
        torch.randn(3, 20, WIDTH, generator=g).requires_grad_(),
        (scale * torch.randn(VOCAB, WIDTH, generator=g)).requires_grad_(),
        torch.randn(VOCAB, generator=g).requires_grad_(),
    )
    teacher = Projection(
        torch.randn(3, 15, 12, generator=g),
        (scale * torch.randn(TEACHER_VOCAB, 12, generator=g)).requires_grad_(),
    )
    positions = torch.randperm(60, generator=g)[:N].sort().values
    targets = torch.randint(VOCAB, (N,), generator=g)
    weights = torch.rand(N, generator=g) + 0.1
    at = torch.where(torch.rand(N, generator=g) < 0.7, torch.randint(45, (N,), generator=g), -1)
    return student, teacher, positions, targets, weights, at


def shared(seed: int, size: int = 30) -> SharedVocabulary:
    g = torch.Generator().manual_seed(seed)
    return SharedVocabulary(
        torch.randperm(VOCAB, generator=g)[:size].sort().values,
        torch.randperm(TEACHER_VOCAB, generator=g)[:size],
    )


def dense(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Probabilities of `ids`, and of all others together."""
    p = logits.double().softmax(-1)[:, ids]
    return torch.cat([p, 1 - p.sum(-1, keepdim=True)], -1)


def naive(seed: int, temperature: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Projection]:
    student, teacher, positions, targets, weights, at = case(seed)
    logits = (student.hidden.flatten(0, 1) @ student.weight.T + student.bias)[positions]
    ce = (F.cross_entropy(logits, targets, reduction="none") * weights).sum() / weights.sum()
    both = at >= 0
    teacher_logits = (teacher.hidden.flatten(0, 1) @ teacher.weight.T)[at[both]].detach()
    ids = shared(seed)
    p, q = (
        dense(teacher_logits / temperature, ids.teacher_ids),
        dense(logits[both] / temperature, ids.student_ids),
    )
    kl = ((p * (p.log() - q.log())).sum(-1) * weights[both]).sum() / weights[both].sum() * temperature**2
    accuracy = ((logits.argmax(-1) == targets) * weights).sum() / weights.sum()
    return ce, kl.float(), accuracy, student


def run(seed: int, temperature: float = 1.0, **options: Any) -> tuple[PositionLosses, Projection, Projection]:
    student, teacher, positions, targets, weights, at = case(seed)
    comparison = Comparison(teacher, at, shared(seed), temperature)
    losses = cross_entropy_and_kl(
        student, positions, targets, weights, Coefficients(1.0, 3.0), comparison=comparison, **options
    )
    return losses, student, teacher


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("block_elements", [MANY_BLOCKS, 2**23])
def test_values_and_gradients_are_those_of_the_naive_form(temperature: float, block_elements: int) -> None:
    *_, reference = naive(1, temperature)
    chosen = (reference.hidden.flatten(0, 1) @ reference.weight.T + reference.bias).log_softmax(-1)
    _, _, positions, targets, _, _ = case(1)
    of_targets = chosen[positions, targets].detach().requires_grad_()
    (pull,) = torch.autograd.grad(of_targets.square().mean(), of_targets)
    losses, student, teacher = run(1, temperature, block_elements=block_elements, pull=pull)
    ce, kl, accuracy, reference = naive(1, temperature)
    assert torch.allclose(losses.loss, ce + 3 * kl, atol=1e-5)
    assert torch.allclose(losses.ce, ce, atol=1e-5)
    assert torch.allclose(losses.kl, kl, atol=1e-5)
    assert torch.allclose(losses.accuracy, accuracy)
    (0.5 * losses.loss).backward()
    chosen = (reference.hidden.flatten(0, 1) @ reference.weight.T + reference.bias).log_softmax(-1)
    (0.5 * (ce + 3 * kl + chosen[positions, targets].square().mean())).backward()
    for ours, theirs in zip(student, reference, strict=True):
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-5)
    assert teacher.weight.grad is None


@pytest.mark.parametrize("size", [0, 1, 30, TEACHER_VOCAB])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_gradients_are_those_of_finite_differences(size: int, temperature: float) -> None:
    """Whichever columns are compared: all of either side, none, with a bucket and without."""
    student, teacher, positions, targets, weights, at = case(9)
    comparison = Comparison(teacher, at, shared(9, size), temperature)

    def loss(hidden: torch.Tensor) -> torch.Tensor:
        return cross_entropy_and_kl(
            Projection(hidden, *student[1:]), positions, targets, weights, Coefficients(0.5, 2.0),
            comparison=comparison, block_elements=MANY_BLOCKS,
        ).loss  # fmt: skip

    loss(student.hidden).backward()
    way = torch.randn(student.hidden.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        slope = (loss(student.hidden + 0.01 * way) - loss(student.hidden - 0.01 * way)) / 0.02
    assert torch.allclose((student.hidden.grad * way).sum(), slope, rtol=0.01, atol=0.01)


def test_what_is_frozen_gets_no_gradient_and_changes_none() -> None:
    losses, student, _ = run(8)
    losses.loss.backward()
    expected = student.hidden.grad
    student, teacher, positions, targets, weights, at = case(8)
    frozen = Projection(student.hidden, student.weight.detach(), student.bias.detach())
    comparison = Comparison(teacher, at, shared(8))
    cross_entropy_and_kl(
        frozen, positions, targets, weights, Coefficients(1.0, 3.0), comparison=comparison
    ).loss.backward()
    assert torch.equal(student.hidden.grad, expected)
    assert student.weight.grad is student.bias.grad is None
    with torch.no_grad():
        assert not cross_entropy_and_kl(student, positions, targets, weights).loss.requires_grad


def test_under_autocast_products_are_of_its_type_and_sums_of_the_weights() -> None:
    losses, student, _ = run(10)
    losses.loss.backward()
    with torch.autocast("cpu", torch.bfloat16):
        half, other, _ = run(10, block_elements=MANY_BLOCKS)
    half.loss.backward()
    assert torch.allclose(half.loss, losses.loss, rtol=0.02)
    for ours, theirs in zip(other, student, strict=True):
        assert ours.grad.dtype == torch.float32
        assert F.cosine_similarity(ours.grad.flatten(), theirs.grad.flatten(), dim=0) > 0.999


def test_same_tokenizer_gives_the_plain_kl_without_padded_columns() -> None:
    student, teacher, positions, targets, *_ = case(2)
    at = torch.arange(N)
    true_size = TEACHER_VOCAB - 4
    with torch.no_grad():
        student.weight[true_size:] = 0  # what is left for padded columns is as good as nothing
        student.bias[true_size:] = -1e4
    losses = cross_entropy_and_kl(
        student, positions, targets, torch.ones(N), comparison=Comparison(teacher, at, identical(true_size))
    )
    log_p = (student.hidden.flatten(0, 1) @ student.weight.T + student.bias)[
        positions, :true_size
    ].log_softmax(-1)
    log_q = (teacher.hidden.flatten(0, 1) @ teacher.weight.T)[at, :true_size].log_softmax(-1)
    assert torch.allclose(
        losses.kl, F.kl_div(log_p, log_q, log_target=True, reduction="batchmean"), atol=1e-5
    )


class Largest(TorchDispatchMode):
    """The largest tensor, in elements, that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def largest_held(positions: int, block_elements: int) -> int:
    student, teacher, *_ = case(3)
    index = torch.arange(positions) % 45
    with Largest() as largest:
        cross_entropy_and_kl(
            student, index, index % VOCAB, torch.ones(positions), Coefficients(1.0, 1.0),
            comparison=Comparison(teacher, index, shared(3)), block_elements=block_elements,
        ).loss.backward()  # fmt: skip
    return largest.elements


def test_peak_memory_does_not_grow_with_the_number_of_positions() -> None:
    def largest_saved(positions: int, block_elements: int) -> int:
        student, teacher, *_ = case(3)
        index = torch.arange(positions) % 45
        sizes: list[int] = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            losses = cross_entropy_and_kl(
                student, index, index % VOCAB, torch.ones(positions), Coefficients(1.0, 1.0),
                comparison=Comparison(teacher, index, shared(3)), block_elements=block_elements,
            )  # fmt: skip
        losses.loss.backward()
        return max(sizes)

    positions = 400
    assert largest_saved(positions, 2**23) <= positions * WIDTH < positions * VOCAB
    assert largest_held(positions, 10 * VOCAB) <= positions * WIDTH
    assert largest_held(positions, 2**23) >= positions * VOCAB  # the measure does see whole logits


def test_same_input_same_bits() -> None:
    results = []
    for _ in range(2):
        losses, student, _ = run(4, block_elements=MANY_BLOCKS)
        losses.loss.backward()
        results.append((losses.ce, losses.kl, student.hidden.grad, student.weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([0, 1, 30, 40]),
    st.sampled_from([0.1, 1.0, 30.0]),
    st.sampled_from([1.0, 4.0]),
)
def test_kl_is_never_negative_nor_nan(seed: int, size: int, scale: float, temperature: float) -> None:
    student, teacher, positions, targets, weights, at = case(seed, scale)
    comparison = Comparison(teacher, at, shared(seed, size), temperature)
    losses = cross_entropy_and_kl(
        student, positions, targets, weights, Coefficients(1.0, 1.0), comparison=comparison
    )
    assert losses.kl >= -1e-5
    if size == 0:
        assert losses.kl.abs() < 1e-5  # one bucket holds everything on both sides
    losses.loss.backward()
    assert all(tensor.grad.isfinite().all() for tensor in student)


@pytest.mark.parametrize("scale", [1.0, 20.0])
@pytest.mark.parametrize("size", [10, VOCAB])
def test_kl_of_a_model_with_itself_under_another_numbering_is_zero(size: int, scale: float) -> None:
    student, _, positions, targets, weights, _ = case(5, scale)
    renumbered = torch.randperm(
        VOCAB, generator=torch.Generator().manual_seed(0)
    )  # teacher id of each student id
    order = renumbered.argsort()
    teacher = Projection(
        student.hidden.detach(), student.weight.detach()[order], student.bias.detach()[order]
    )
    ids = torch.arange(VOCAB)[:size]
    comparison = Comparison(teacher, positions, SharedVocabulary(ids, renumbered[ids]))
    losses = cross_entropy_and_kl(
        student, positions, targets, weights, Coefficients(0.0, 1.0), comparison=comparison
    )
    losses.loss.backward()
    assert losses.kl.abs() < 1e-5
    assert student.weight.grad.abs().max() < 1e-5


def test_bucket_holds_the_mass_of_all_unshared_tokens() -> None:
    """Moving mass between unshared tokens changes nothing, moving it to a shared one does."""

    def kl(unshared: list[float], shared_logit: float) -> torch.Tensor:
        student = Projection(torch.ones(1, 1), torch.tensor([[shared_logit], *([x] for x in unshared)]))
        teacher = Projection(torch.ones(1, 1), torch.tensor([[0.0], [0.0]]))
        ids = SharedVocabulary(torch.tensor([0]), torch.tensor([0]))
        one = torch.zeros(1, dtype=torch.long)
        return cross_entropy_and_kl(
            student, one, one, torch.ones(1), comparison=Comparison(teacher, one, ids)
        ).kl

    half = float(np.log(0.5))
    assert kl([half, half], 0.0).abs() < 1e-6
    assert torch.allclose(kl([float(np.log(0.9)), float(np.log(0.1))], 0.0), kl([half, half], 0.0), atol=1e-6)
    assert torch.allclose(
        kl([half, half], float(np.log(3))), torch.tensor(0.5 * np.log(4 / 3)).float(), atol=1e-6
    )


@pytest.mark.parametrize("compare", [True, False])
def test_nothing_counted_is_zero_and_keeps_its_gradient(compare: bool) -> None:
    student, teacher, *_ = case(6)
    none = torch.empty(0, dtype=torch.long)
    comparison = Comparison(teacher, none, shared(6)) if compare else None
    losses = cross_entropy_and_kl(student, none, none, torch.empty(0), comparison=comparison)
    assert losses.ce == losses.kl == losses.accuracy == 0
    losses.loss.backward()
    assert student.hidden.grad.abs().sum() == 0


def test_half_precision_heads_are_summed_in_single_precision() -> None:
    student, _, positions, targets, weights, _ = case(7)
    half = Projection(*(tensor.detach().bfloat16() for tensor in student))
    losses = cross_entropy_and_kl(half, positions, targets, weights)
    assert losses.ce.dtype == torch.float32
    assert torch.allclose(losses.ce, cross_entropy_and_kl(student, positions, targets, weights).ce, rtol=0.02)


# --------------------------------------------------------------------------------------------------------------- chunks


def two_documents() -> tuple[list[Alignment], list[np.ndarray]]:
    """Text 1: student tokens 1,2|3|4,5, teacher 1|2|3,4,5 after a first token. Text 2: only single tokens."""
    first = Alignment(np.array([0, 2, 3, 5]), np.array([0, 1, 2, 5]), np.array([False, True, False]))
    return [first, identity_alignment(4)], [np.array([0, 1, 1, 1, 1, 1.0]), np.array([0, 1, 1, 1.0])]


@given(st.integers(0, 1000), st.sampled_from([1.0, 3.0]))
@settings(max_examples=25, deadline=None)
def test_chunk_likelihood_is_the_binary_kl_of_products(seed: int, temperature: float) -> None:
    alignments, weights = two_documents()
    batch = collate(alignments, weights, 6, 6)
    g = torch.Generator().manual_seed(seed)
    student = torch.rand(len(batch.student_index), generator=g).double().log()
    teacher = torch.rand(len(batch.chunk_teacher_index), generator=g).double().log()
    p = torch.stack([teacher[:1].sum(), teacher[1:].sum()]).div(temperature).exp()
    q = torch.stack([student[:2].sum(), student[3:5].sum()]).div(temperature).exp()
    expected = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    loss = chunk_likelihood(batch, student.float(), teacher.float(), temperature)
    assert torch.allclose(loss.double(), expected, atol=1e-4)


@pytest.mark.parametrize("student_p", [0.0, -1e-9, -1e-3, -200.0])
@pytest.mark.parametrize("teacher_p", [0.0, -1e-9, -1e-3, -200.0])
def test_chunk_likelihood_is_finite_for_certain_and_impossible_chunks(
    student_p: float, teacher_p: float
) -> None:
    alignments, weights = two_documents()
    batch = collate(alignments, weights, 6, 6)
    student = torch.full((len(batch.student_index),), student_p, requires_grad=True)
    teacher = torch.full((len(batch.chunk_teacher_index),), teacher_p)
    loss = chunk_likelihood(batch, student, teacher)
    loss.backward()
    assert loss.isfinite()
    assert loss >= -1e-6
    assert student.grad.isfinite().all()


def test_all_losses_of_a_batch() -> None:
    alignments, weights = two_documents()
    batch = collate(alignments, weights, 6, 6)
    g = torch.Generator().manual_seed(0)
    student = Projection(
        torch.randn(2, 6, WIDTH, generator=g).requires_grad_(), torch.randn(VOCAB, WIDTH, generator=g)
    )
    teacher = Projection(torch.randn(2, 6, 12, generator=g), torch.randn(TEACHER_VOCAB, 12, generator=g))
    student_ids = torch.randint(VOCAB, (2, 6), generator=g)
    teacher_ids = torch.randint(TEACHER_VOCAB, (2, 6), generator=g)
    options = {"teacher": teacher, "teacher_ids": teacher_ids, "vocabulary": shared(0)}
    coefficients = Coefficients(1.0, 2.0, 3.0)
    losses = distillation_losses(batch, student, student_ids, coefficients, **options)

    log_p = (student.hidden @ student.weight.T).log_softmax(-1)
    log_q = (teacher.hidden @ teacher.weight.T).log_softmax(-1)
    own = log_p[:, :-1].gather(-1, student_ids[:, 1:, None]).squeeze(-1)
    theirs = log_q[:, :-1].gather(-1, teacher_ids[:, 1:, None]).squeeze(-1)
    assert torch.allclose(losses.ce, -torch.cat([own[0], own[1, :3]]).mean(), atol=1e-5)
    s = torch.stack([own[0, :2].sum(), own[0, 3:].sum()]).double()
    t = torch.stack([theirs[0, :1].sum(), theirs[0, 2:].sum()]).double()
    p, q = t.exp(), s.exp()
    chunk = (p * (t - s) + (1 - p) * (torch.log1p(-p) - torch.log1p(-q))).mean()
    assert torch.allclose(losses.chunk.double(), chunk, atol=1e-5)
    assert torch.allclose(losses.loss, losses.ce + 2 * losses.kl + 3 * losses.chunk)
    losses.loss.backward()
    without = Coefficients(1.0, 2.0)
    again = student._replace(hidden=student.hidden.detach().requires_grad_())
    distillation_losses(batch, again, student_ids, without, **options).loss.backward()
    (of_chunks,) = torch.autograd.grad(3 * chunk, student.hidden)
    assert torch.allclose(student.hidden.grad, again.hidden.grad + of_chunks, atol=1e-5)

    alone = distillation_losses(batch, student, student_ids, Coefficients())
    assert torch.equal(alone.ce, losses.ce)
    assert alone.kl == alone.chunk == 0


# ------------------------------------------------------------------------------------------------------------- balance


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_balanced_routers_score_one(scores: str) -> None:
    one_each = 20 * torch.eye(4).repeat(6, 1)
    assert torch.allclose(load_balance([one_each] * 3, 1, scores="softmax"), torch.tensor(1.0), atol=1e-4)
    assert torch.allclose(load_balance([one_each] * 3, 1, scores=scores), torch.tensor(1.0), atol=1e-4)


def test_each_layer_collapsing_on_another_expert_is_not_balanced() -> None:
    layers = [20 * F.one_hot(torch.full((24,), layer), 4).float() for layer in range(4)]
    assert load_balance(layers, 1) > 3.9


def test_load_balance_is_the_switch_loss_of_each_layer_and_leaves_padding_out() -> None:
    g = torch.Generator().manual_seed(0)
    layers = [torch.randn(12, 6, generator=g).requires_grad_() for _ in range(2)]
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]])
    kept = mask.flatten().bool()
    expected = []
    for layer in layers:
        p = layer[kept].softmax(-1)
        share = torch.bincount(p.topk(2).indices.flatten(), minlength=6) / (2 * kept.sum())
        expected.append(6 * (share * p.mean(0)).sum())
    loss = load_balance(layers, 2, mask)
    assert torch.allclose(loss, torch.stack(expected).mean())
    loss.backward()
    assert all(layer.grad[kept].abs().sum() > 0 and layer.grad[~kept].abs().sum() == 0 for layer in layers)
