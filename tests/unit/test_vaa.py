"""View-Aligned Attention over spans of text."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepfusion.errors import InputError
from deepfusion.learning.vaa import ViewAlignedAttention, block_ends, span_pooling

BLOCKS, PATCHES, KERNEL = 2, 8, 2
SETTINGS = {"blocks": BLOCKS, "patches": PATCHES, "width": 8, "heads": 2, "kernel": KERNEL}


def words(*ends: int) -> np.ndarray:
    """BOS, tokens that end at `ends`, EOS."""
    starts = (0, *ends[:-1])
    return np.array([(0, 0), *zip(starts, ends, strict=True), (0, 0)])


def inputs(
    tokens: int = 12, seed: int = 0
) -> tuple[list[torch.Tensor], torch.Tensor, list[torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    spans = PATCHES // BLOCKS
    student, teacher = words(*range(2, 2 * tokens, 2)), words(*range(3, 2 * tokens, 3))
    length = 2 * tokens - 2
    return (
        [torch.randn(1, len(student), 16, generator=generator) for _ in range(BLOCKS)],
        span_pooling([student], [length], spans * KERNEL, len(student)),
        [torch.randn(1, len(teacher), 12, generator=generator) for _ in range(BLOCKS)],
        span_pooling([teacher], [length], spans, len(teacher)),
    )


@pytest.mark.parametrize(
    ("layers", "blocks", "ends"), [(6, 3, [2, 4, 6]), (6, 4, [1, 3, 4, 6]), (2, 2, [1, 2]), (5, 1, [5])]
)
def test_block_ends(layers: int, blocks: int, ends: list[int]) -> None:
    assert block_ends(layers, blocks) == ends


@given(st.integers(1, 64), st.integers(1, 64))
def test_blocks_are_of_about_equal_size(layers: int, blocks: int) -> None:
    if blocks > layers:
        with pytest.raises(InputError, match="too-many-blocks"):
            block_ends(layers, blocks)
        return
    ends = block_ends(layers, blocks)
    sizes = np.diff([0, *ends])
    assert (len(ends), ends[-1]) == (blocks, layers)
    assert sizes.min() >= 1
    assert sizes.max() - sizes.min() <= 1


def test_pooling_weighs_tokens_by_the_characters_they_share_with_a_span() -> None:
    pool = span_pooling([words(2, 5, 8)], [8], spans=2, max_tokens=6)
    expected = [[0, 2 / 4, 2 / 4, 0, 0, 0], [0, 0, 1 / 4, 3 / 4, 0, 0]]
    assert torch.allclose(pool[0], torch.tensor(expected))


def test_pooling_of_untouched_spans_and_empty_texts() -> None:
    pool = span_pooling([words(2, 4), np.array([(0, 0), (0, 0)]), np.empty((0, 2))], [16, 0, 0], 4, 4)
    assert pool[0, 1:].argmax(-1).tolist() == [2, 2, 2]
    assert pool[0, 0].tolist() == [0, 0.5, 0.5, 0]
    assert torch.equal(pool[1], torch.eye(4)[0].expand(4, 4))
    assert torch.equal(pool[2], pool[1])


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 5), max_size=12), min_size=1, max_size=3),
    st.integers(1, 9),
    st.integers(0, 4),
    st.integers(0, 9),
)
def test_pooling_rows_are_averages(documents: list[list[int]], spans: int, padding: int, unread: int) -> None:
    offsets = [words(*np.cumsum(widths).tolist()) if widths else words(0)[:2] for widths in documents]
    longest = max(map(len, offsets)) + padding
    pool = span_pooling(offsets, [sum(widths) + unread for widths in documents], spans, longest)
    assert pool.shape == (len(documents), spans, longest)
    assert torch.allclose(pool.sum(-1), torch.ones(len(documents), spans))
    assert (pool >= 0).all()
    for document, widths, row in zip(offsets, documents, pool, strict=True):
        if widths:
            assert row[:, 0].abs().max() == 0  # beginning of sequence
            assert row[:, len(document) - 1 :].abs().max() == 0  # end of sequence, padding
        if not unread and widths:
            mean = row.mean(0)[1 : len(widths) + 1]
            assert torch.allclose(mean, torch.tensor(widths) / sum(widths), atol=1e-5)


def test_loss_is_that_of_the_formula() -> None:
    torch.manual_seed(0)
    module = ViewAlignedAttention(16, 12, **SETTINGS | {"heads": 1}, normalize=False)
    student, student_pool, teacher, teacher_pool = inputs()
    spans, width = module.spans, 8
    patches = []
    for conv, states in zip(
        module.patchify, student, strict=True
    ):  # [DF eq. 7], each patch joins `kernel` sub-spans
        pooled = (student_pool @ states)[0].reshape(spans, KERNEL, 16)
        patches.append(torch.einsum("pkc,dck->pd", pooled, conv.weight) + conv.bias)
    features = torch.cat(patches)
    w_q, w_k, w_v = module.qkv.weight.chunk(3)
    scores = (features @ w_q.T) @ (features @ w_k.T).T / width**0.5
    mixed = scores.softmax(-1) @ (features @ w_v.T)  # [DF eq. 8]
    expected = sum(
        ((project(part) - (teacher_pool @ states)[0]) ** 2).mean()
        for project, part, states in zip(module.project, mixed.split(spans), teacher, strict=True)
    )  # [DF eq. 9]
    loss = module(student, student_pool, teacher, teacher_pool)
    assert loss.shape == ()
    assert torch.allclose(loss, expected, atol=1e-6)


def test_normalised_loss_does_not_depend_on_the_scale_of_the_teacher() -> None:
    torch.manual_seed(0)
    module = ViewAlignedAttention(16, 12, **SETTINGS)
    student, student_pool, teacher, teacher_pool = inputs()
    loss = module(student, student_pool, teacher, teacher_pool)
    scaled = module(student, student_pool, [100 * states + 3 for states in teacher], teacher_pool)
    assert torch.allclose(loss, scaled, rtol=1e-3)


@pytest.mark.parametrize(("mode", "causal"), [("vaa", False), ("vaa", True), ("direct", False)])
def test_gradients_reach_student_and_module_but_not_the_teacher(mode: str, causal: bool) -> None:
    torch.manual_seed(0)
    module = ViewAlignedAttention(16, 12, **SETTINGS, mode=mode, causal=causal)
    student, student_pool, teacher, teacher_pool = inputs()
    for states in student + teacher:
        states.requires_grad_()
    module(student, student_pool, teacher, teacher_pool).backward()
    assert all(states.grad is not None and states.grad.abs().sum() > 0 for states in student)
    assert all(states.grad is None for states in teacher)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


def test_loss_falls_when_trained() -> None:
    torch.manual_seed(0)
    module = ViewAlignedAttention(16, 12, **SETTINGS)
    arguments = inputs()
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    first = module(*arguments).item()
    for _ in range(60):
        optimizer.zero_grad()
        loss = module(*arguments)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3 * first


def block_gradients(mode: str, causal: bool, teacher_block: int, teacher_span: int) -> torch.Tensor:
    """[blocks, tokens]: how the match of one teacher block and span depends on the student's tokens of every block."""
    torch.manual_seed(0)
    module = ViewAlignedAttention(16, 12, **SETTINGS, mode=mode, causal=causal, normalize=False)
    student, student_pool, teacher, teacher_pool = inputs()
    for states in student:
        states.requires_grad_()
    moved = [states.clone() for states in teacher]
    inside = teacher_pool[0, teacher_span] > 0
    moved[teacher_block][0, inside] += 1
    only = torch.zeros_like(teacher_pool)
    only[0, teacher_span] = teacher_pool[0, teacher_span]
    difference = module(student, student_pool, moved, only) - module(student, student_pool, teacher, only)
    grads = torch.autograd.grad(difference, student, allow_unused=True)
    return torch.stack(
        [g.abs().sum((0, 2)) if g is not None else torch.zeros(student_pool.shape[-1]) for g in grads]
    )


def test_attention_sees_all_blocks_and_spans_and_direct_only_its_own() -> None:
    own = inputs()[1][0, KERNEL : 2 * KERNEL].sum(0) > 0  # tokens of span 1
    everywhere = block_gradients("vaa", False, 0, 1)
    assert (everywhere[:, 1:-1] > 0).all()
    direct = block_gradients("direct", False, 0, 1)
    assert torch.equal(direct[0] > 0, own)
    assert direct[1].sum() == 0


def test_causal_attention_does_not_see_later_spans() -> None:
    pool = inputs()[1][0]
    later = (pool[2 * KERNEL :].sum(0) > 0) & (pool[: 2 * KERNEL].sum(0) == 0)
    grads = block_gradients("vaa", True, 0, 1)
    assert later.any()
    assert grads[:, later].sum() == 0
    assert (grads[:, 1:3] > 0).all()


@pytest.mark.parametrize(
    ("change", "code"), [({"patches": 7}, "patches-not-divisible"), ({"heads": 3}, "width-not-divisible")]
)
def test_bad_sizes_are_user_errors(change: dict, code: str) -> None:
    with pytest.raises(InputError, match=code):
        ViewAlignedAttention(16, 12, **SETTINGS | change)
