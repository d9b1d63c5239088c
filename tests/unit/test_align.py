"""Alignment of real tokenizers, trained here on a few words."""

from __future__ import annotations

import json
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from deepfusion.learning.align import (
    Alignment,
    align_offsets,
    collate,
    identity_alignment,
    shared_vocabulary,
    token_weights,
)

CORPUS = [
    "The patient has 3 fevers, and the doctor's notes say so.",
    "A café at the bank: interest rates fell by 25 %!\n\nThe doctors invest.",
    "the the the doctor patient and and bank bank 😀 中文 hello world",
] * 3
SPECIAL = ["<unk>", "<s>", "</s>"]
KINDS = ["gpt2", "gpt2_trimmed", "bloom_prefix", "llama", "metaspace", "unigram"]


@cache
def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    if kind in ("gpt2", "gpt2_trimmed", "bloom_prefix"):
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "bloom_prefix")
        backend.decoder = decoders.ByteLevel()
        sizes = {"gpt2": 400, "gpt2_trimmed": 300, "bloom_prefix": 330}
        trainer = trainers.BpeTrainer(
            vocab_size=sizes[kind],
            special_tokens=SPECIAL,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
    elif kind == "unigram":
        backend = Tokenizer(models.Unigram())
        backend.normalizer = normalizers.NFKC()
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        backend.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=100, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
        )
    else:
        backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        if kind == "llama":
            backend.normalizer = normalizers.Sequence(
                [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
            )
            backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
            backend.decoder = decoders.Sequence(
                [
                    decoders.Replace("▁", " "),
                    decoders.ByteFallback(),
                    decoders.Fuse(),
                    decoders.Strip(" ", 1, 0),
                ]
            )
        else:
            backend.pre_tokenizer = pre_tokenizers.Metaspace()
            backend.decoder = decoders.Metaspace()
        trainer = trainers.BpeTrainer(
            vocab_size=400 if kind == "llama" else 360,
            special_tokens=[*SPECIAL, *byte_tokens],
            limit_alphabet=50,
            show_progress=False,
        )
    backend.train_from_iterator(CORPUS, trainer)
    # The trainer can add byte tokens only as special tokens; in real tokenizers they are ordinary ones.
    spec = json.loads(backend.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] in SPECIAL]
    backend = Tokenizer.from_str(json.dumps(spec))
    template = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    backend.post_processor = (
        processors.Sequence([processors.ByteLevel(trim_offsets=True), template])
        if kind == "gpt2_trimmed"
        else template
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.add_tokens(
        [AddedToken("  ", normalized=False)]
    )  # as GPT-NeoX has: an added token that is ordinary text
    return fast


def offsets(kind: str, text: str) -> np.ndarray:
    return np.array(tokenizer(kind)(text, return_offsets_mapping=True)["offset_mapping"])


def tokens(kind: str, text: str) -> list[str]:
    return tokenizer(kind).convert_ids_to_tokens(tokenizer(kind)(text)["input_ids"])


def next_tokens(alignment: Alignment, student: list[str], teacher: list[str]) -> list[tuple[str, str]]:
    pairs = zip(alignment.student_index[:-1], alignment.teacher_index[:-1], alignment.single, strict=True)
    return [(student[s + 1], teacher[t + 1]) for s, t, single in pairs if single]


pieces = st.one_of(
    st.sampled_from([*"  \n\t,.%3", "the ", " doctor", "patient", " and", "bank"]),
    st.sampled_from(["😀", "👩‍👩‍👧", "中", "文", "e\u0301", "é", "ﬁ", "\u00a0", "ß", "\u200b", "𝔘"]),
    st.characters(exclude_categories=["Cs"]),
)
texts = st.lists(pieces, max_size=25).map("".join)
pairs = st.tuples(st.sampled_from(KINDS), st.sampled_from(KINDS))


def test_words_align_whichever_side_the_space_is_counted_on() -> None:
    text = "The doctor and the patient"
    for student, teacher in [("gpt2", "llama"), ("gpt2_trimmed", "metaspace"), ("llama", "gpt2_trimmed")]:
        alignment = align_offsets(offsets(student, text), offsets(teacher, text))
        ends = offsets(student, text)[alignment.student_index, 1]
        assert {3, 10, 14, 18, 26} <= set(ends.tolist())
        chosen = next_tokens(alignment, tokens(student, text), tokens(teacher, text))
        assert chosen[-1] == ("</s>", "</s>")
        assert len(chosen) >= 3
        for one, other in chosen:
            assert one.replace("Ġ", "▁") == other.replace("Ġ", "▁")


def test_bytes_of_one_character_have_one_boundary_after_the_last() -> None:
    text = "a 😀 b"
    student = offsets("gpt2_trimmed", text)
    assert np.sum((student[:, 0] <= 2) & (student[:, 1] == 3)) > 1, "the emoji should be split into bytes"
    alignment = align_offsets(student, offsets("unigram", text))
    after = alignment.student_index[student[alignment.student_index, 1] == 3]
    assert after.tolist() == [np.flatnonzero(student[:, 1] == 3).max()]


def test_start_of_text_is_a_chunk_of_its_own() -> None:
    alignment = align_offsets(offsets("gpt2", "The bank"), offsets("llama", "The bank"))
    assert (alignment.student_index[0], alignment.teacher_index[0], alignment.single[0]) == (0, 0, False)


@pytest.mark.parametrize("kinds", [("gpt2", "llama"), ("unigram", "gpt2")])
def test_empty_text_aligns_its_special_tokens(kinds: tuple[str, str]) -> None:
    alignment = align_offsets(offsets(kinds[0], ""), offsets(kinds[1], ""))
    assert alignment.student_index.tolist() == alignment.teacher_index.tolist() == [0, 1]


def test_no_tokens_at_all() -> None:
    alignment = align_offsets(np.empty((0, 2), int), offsets("gpt2", "The bank"))
    assert len(alignment.student_index) == len(alignment.single) == 0


def test_end_of_sequence_does_not_align_with_a_truncated_text() -> None:
    text = "The doctor and the patient"
    student, teacher = offsets("gpt2", text), offsets("llama", text)
    alignment = align_offsets(student, teacher[:-3])
    assert alignment.student_index.max() < len(student) - 1
    assert len(alignment.student_index) > 2


@settings(max_examples=150, deadline=None)
@given(texts, pairs)
def test_both_sides_have_read_the_same_characters_at_a_boundary(text: str, kinds: tuple[str, str]) -> None:
    student, teacher = (offsets(kind, text) for kind in kinds)
    alignment = align_offsets(student, teacher)
    s, t = alignment.student_index, alignment.teacher_index
    assert len(s) == len(t) == len(alignment.single) + 1
    assert np.all(np.diff(s) > 0)
    assert np.all(np.diff(t) > 0)
    # End-of-sequence aligns, unless a normaliser dropped the last character and so the two sides end at different ones.
    if student[:, 1].max() == teacher[:, 1].max():
        assert (s[-1], t[-1]) == (len(student) - 1, len(teacher) - 1)
    for a, b in zip(s[:-1], t[:-1], strict=True):
        read = student[: a + 1, 1].max()
        assert read == teacher[: b + 1, 1].max()
        for side, index in ((student, a), (teacher, b)):
            later = side[index + 1 :]
            assert np.all(later[later[:, 1] > later[:, 0], 0] >= read)
    mirrored = align_offsets(teacher, student)
    assert np.array_equal(mirrored.student_index, t)
    assert np.array_equal(mirrored.single, alignment.single)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=12), texts)
def test_nonsense_offsets_give_an_orderly_alignment(garbage: list[tuple[int, int]], text: str) -> None:
    alignment = align_offsets(np.array(garbage).reshape(-1, 2), offsets("gpt2", text))
    assert np.all(np.diff(alignment.student_index) > 0)
    assert np.all(np.diff(alignment.teacher_index) > 0)
    assert np.all(alignment.student_index < max(len(garbage), 1))


@pytest.mark.parametrize("kinds", [("gpt2", "gpt2_trimmed"), ("gpt2", "llama"), ("metaspace", "unigram")])
def test_shared_tokens_mean_the_same_text(kinds: tuple[str, str]) -> None:
    student, teacher = (tokenizer(kind) for kind in kinds)
    shared = shared_vocabulary(student, teacher)
    assert not shared.identical
    assert len(shared.student_ids) > 20
    assert shared.student_ids.diff().min() > 0
    assert len(shared.teacher_ids.unique()) == len(shared.teacher_ids)
    assert shared.student_ids.dtype == torch.long
    found = dict(zip(shared.student_ids.tolist(), shared.teacher_ids.tolist(), strict=True))
    assert found[student.eos_token_id] == teacher.eos_token_id
    assert found[student.convert_tokens_to_ids("  ")] == teacher.convert_tokens_to_ids("  ")
    assert student.bos_token_id not in found
    assert student.unk_token_id not in found
    for one, other in found.items():
        # A word in front keeps decoders from stripping the space of the token in question.
        before = (
            student("the", add_special_tokens=False)["input_ids"],
            teacher("the", add_special_tokens=False)["input_ids"],
        )
        assert student.decode([*before[0], one]) == teacher.decode([*before[1], other])


def test_space_marks_and_byte_tokens_are_paired() -> None:
    student, teacher = tokenizer("gpt2"), tokenizer("llama")
    shared = shared_vocabulary(student, teacher)
    names = {
        student.convert_ids_to_tokens(s): teacher.convert_ids_to_tokens(t)
        for s, t in zip(shared.student_ids.tolist(), shared.teacher_ids.tolist(), strict=True)
    }
    assert names["Ġthe"] == "▁the"
    assert names["ð"] == "<0xF0>"  # the first byte of an emoji
    assert names["a"] == "a"  # and not <0x61>
    assert "Ċ" in names


def test_same_tokenizer_is_identical_whatever_its_run_time_settings() -> None:
    one = tokenizer("gpt2")
    copy = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(one.backend_tokenizer.to_str()), eos_token="</s>"
    )
    copy.backend_tokenizer.enable_truncation(5)
    shared = shared_vocabulary(one, copy)
    assert shared.identical
    assert shared.student_ids.tolist() == shared.teacher_ids.tolist() == list(range(len(one)))
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(one.backend_tokenizer.to_str()))
    other.add_tokens(["new"])
    assert not shared_vocabulary(one, other).identical


def test_token_weight_is_that_of_its_last_character() -> None:
    text = "The patient: the bank"
    weights = np.zeros(len(text))
    weights[13:] = 1  # completion "the bank"; its first token may begin at the space before
    for kind in KINDS:
        of = token_weights(offsets(kind, text), weights)
        ends = offsets(kind, text)[1:-1, 1]
        assert of.dtype == np.float32
        assert np.array_equal(of[1:-1], (ends > 13).astype(np.float32))
        assert of[-1] == 1  # end-of-sequence follows the completion
    assert token_weights(offsets("gpt2", ""), np.zeros(0)).tolist() == [0, 0]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(texts, st.integers(0, 20)), min_size=1, max_size=4), pairs)
def test_collated_positions_are_the_counted_ones(
    documents: list[tuple[str, int]], kinds: tuple[str, str]
) -> None:
    student = [offsets(kinds[0], text) for text, _ in documents]
    teacher = [offsets(kinds[1], text) for text, _ in documents]
    weights = [
        token_weights(o, np.arange(len(text)) >= prompt)
        for o, (text, prompt) in zip(student, documents, strict=True)
    ]
    alignments = [align_offsets(s, t) for s, t in zip(student, teacher, strict=True)]
    s_length, t_length = max(map(len, student)), max(map(len, teacher))
    batch = collate(alignments, weights, s_length, t_length)

    expected = [
        row * s_length + i for row, w in enumerate(weights) for i in range(len(w) - 1) if w[i + 1] > 0
    ]
    assert batch.student_index.tolist() == expected
    teacher_of = {
        row * s_length + a.student_index[k]: row * t_length + a.teacher_index[k]
        for row, a in enumerate(alignments)
        for k in np.flatnonzero(a.single)
    }
    assert batch.teacher_index.tolist() == [teacher_of.get(i, -1) for i in expected]
    for chunk in range(len(batch.chunk_weights)):
        at_student = batch.student_index[batch.student_chunk == chunk]
        at_teacher = batch.chunk_teacher_index[batch.teacher_chunk == chunk]
        row = int(at_student[0]) // s_length
        begin, end = at_student[0] - row * s_length, at_student[-1] - row * s_length + 1
        k = alignments[row].student_index.tolist().index(begin)
        assert alignments[row].student_index[k + 1] == end
        assert len(at_student) == end - begin
        expected_teacher = np.arange(alignments[row].teacher_index[k], alignments[row].teacher_index[k + 1])
        assert np.array_equal(at_teacher.numpy(), expected_teacher + row * t_length)
        assert batch.chunk_weights[chunk] == 1
        assert torch.all(batch.teacher_index[batch.student_chunk == chunk] == -1)


def test_same_tokenizer_compares_every_position_and_has_no_chunks() -> None:
    weights = [np.array([0, 1, 1, 1.0]), np.array([0, 0, 1.0])]
    batch = collate([identity_alignment(4), identity_alignment(3)], weights, 5, 6)
    assert batch.student_index.tolist() == [0, 1, 2, 6]
    assert batch.teacher_index.tolist() == [0, 1, 2, 7]
    assert len(batch.chunk_weights) == len(batch.chunk_teacher_index) == 0
    assert torch.all(batch.student_chunk == -1)
