"""Alignment of two tokenizations of the same text: pure functions, no models.

Teacher and student read the same characters but cut them differently. Two things can still be compared:

- *distributions over the next token*, where both have read exactly the same characters: at a shared **boundary**, over
  the tokens that both vocabularies have (`shared_vocabulary`);
- *probabilities of the same characters*, over a **chunk**: the tokens between two consecutive shared boundaries.

A boundary is where a token **ends**. Tokenizers disagree on whether the space before a word lies inside the word's
offsets (`[3, 6)` or `[4, 6)` for " do"), never on where the word ends; so by looking at ends only, whitespace between
two tokens always belongs to the later one and both conventions give the same boundaries.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from deepfusion.errors import InputError

# The end-of-sequence token has no characters: its "end" lies this far beyond the end of the text, so that it is a
# boundary shared exactly by sequences which end at the same character.
_BEYOND_TEXT = 1 << 40
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


# --------------------------------------------------------------------------------------------------------- vocabularies


@dataclass(frozen=True)
class SharedVocabulary:
    """Pairs of token ids that stand for the same bytes in two vocabularies.

    Attributes:
        student_ids: int64 [S], strictly increasing.
        teacher_ids: int64 [S], each id at most once.
        identical: True if both tokenizers are the same; the ids are then `0..S-1` on both sides, where S is the true
            size of the vocabulary, which may be smaller than a model's (padded) output layer.
    """

    student_ids: Tensor
    teacher_ids: Tensor
    identical: bool = False

    def to(self, device: torch.device | str) -> SharedVocabulary:
        """A copy with its tensors on `device`."""
        return SharedVocabulary(self.student_ids.to(device), self.teacher_ids.to(device), self.identical)


def shared_vocabulary(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> SharedVocabulary:
    """Pair the tokens of two tokenizers by the bytes they stand for, and their end-of-sequence tokens with each other.

    "Ġ" of byte-level alphabets, "▁" of metaspace ones and `<0xNN>` byte tokens are all read as the bytes they mean.
    Special tokens other than end-of-sequence are never paired.

    Raises:
        InputError: `slow-tokenizer` if one of them is not a fast tokenizer, which has no character offsets.
    """
    specs = [_specification(tokenizer) for tokenizer in (student, teacher)]
    if specs[0] == specs[1]:
        ids = torch.arange(max(student.get_vocab().values(), default=-1) + 1)
        return SharedVocabulary(ids, ids.clone(), identical=True)
    student_surfaces, teacher_surfaces = (
        _surfaces(tokenizer, spec) for tokenizer, spec in zip((student, teacher), specs, strict=True)
    )
    pairs = [(id_, teacher_surfaces[s]) for s, id_ in student_surfaces.items() if s in teacher_surfaces]
    if student.eos_token_id is not None and teacher.eos_token_id is not None:
        pairs.append((student.eos_token_id, teacher.eos_token_id))
    table = torch.tensor(sorted(pairs), dtype=torch.long).reshape(-1, 2)
    return SharedVocabulary(table[:, 0].contiguous(), table[:, 1].contiguous())


def _specification(tokenizer: PreTrainedTokenizerBase) -> dict:
    """The content of tokenizer.json without the settings that a call changes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InputError(
            "the tokenizer cannot give character offsets",
            where=tokenizer.name_or_path or type(tokenizer).__name__,
            allowed="a fast tokenizer (tokenizer.json)",
            code="slow-tokenizer",
        )
    spec = json.loads(backend.to_str())
    return {key: value for key, value in spec.items() if key not in ("truncation", "padding")}


def _surfaces(tokenizer: PreTrainedTokenizerBase, spec: dict) -> dict[bytes, int]:
    """Bytes -> token id, without special tokens; a byte token `<0xNN>` only where no ordinary token means that byte."""
    added = {token["id"] for token in spec["added_tokens"]}
    special = set(tokenizer.all_special_ids) | {
        token["id"] for token in spec["added_tokens"] if token["special"]
    }
    steps = {
        key: json.dumps(spec[key], ensure_ascii=False) for key in ("normalizer", "pre_tokenizer", "decoder")
    }
    byte_level = "ByteLevel" in steps["decoder"] or "ByteLevel" in steps["pre_tokenizer"]
    metaspace = any("▁" in step for step in steps.values())
    byte_tokens = "ByteFallback" in steps["decoder"] or bool(spec["model"].get("byte_fallback"))

    ordinary: dict[bytes, int] = {}
    single_bytes: dict[bytes, int] = {}
    for token, id_ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        if id_ in special:
            continue
        if id_ in added:  # added tokens hold literal text, whatever the alphabet of the others
            ordinary.setdefault(token.encode(), id_)
        elif byte_tokens and (match := _BYTE_TOKEN.fullmatch(token)):
            single_bytes.setdefault(bytes([int(match[1], 16)]), id_)
        elif byte_level:
            ordinary.setdefault(_from_byte_alphabet(token), id_)
        else:
            ordinary.setdefault((token.replace("▁", " ") if metaspace else token).encode(), id_)
    return single_bytes | ordinary


@cache
def _byte_alphabet() -> dict[str, int]:
    return {char: byte for byte, char in bytes_to_unicode().items()}


def _from_byte_alphabet(token: str) -> bytes:
    alphabet = _byte_alphabet()
    # A token with a character outside the alphabet was never made from bytes: it stands for itself.
    return bytes(alphabet[c] for c in token) if all(c in alphabet for c in token) else token.encode()


# ----------------------------------------------------------------------------------------------------------- boundaries


@dataclass(frozen=True)
class Alignment:
    """The P shared boundaries of two tokenizations of one text, in text order, and the P-1 chunks between them.

    Chunk k is made of the student's tokens `student_index[k]+1 ..= student_index[k+1]`, and likewise the teacher's.

    Attributes:
        student_index: int64 [P], strictly increasing; the student token that ends at the boundary, hence the position
            whose output predicts what follows.
        teacher_index: int64 [P], the same for the teacher.
        single: bool [P-1], True where the chunk is one and the same token on both sides, so that the two next-token
            distributions at its start can be compared.
    """

    student_index: np.ndarray
    teacher_index: np.ndarray
    single: np.ndarray


def align_offsets(
    student_offsets: np.ndarray, teacher_offsets: np.ndarray, apart: Sequence[int] = ()
) -> Alignment:
    """Find the boundaries that two tokenizations of one text share.

    Args:
        student_offsets: integers [Ts, 2], `[start, end)` of each token in characters, without padding; special tokens
            have zero width, a zero-width last token is taken for end-of-sequence.
        teacher_offsets: the same for the teacher, [Tt, 2]. Either sequence may be truncated.
        apart: characters where the two sides have read different marks, so that the chunks that begin there are
            not `single`.

    The chunk at the start of the text is never `single`: metaspace tokenizers put a space there which is not in the
    text, so "▁The" and "The" are different tokens with different alternatives.
    """
    student_ends, student_tokens = _boundaries(np.asarray(student_offsets))
    teacher_ends, teacher_tokens = _boundaries(np.asarray(teacher_offsets))
    ends, in_student, in_teacher = np.intersect1d(
        student_ends, teacher_ends, assume_unique=True, return_indices=True
    )
    student, teacher = student_tokens[in_student], teacher_tokens[in_teacher]
    single = (np.diff(student) == 1) & (np.diff(teacher) == 1) & (ends[:-1] > 0) & ~np.isin(ends[:-1], apart)
    return Alignment(student, teacher, single)


def identity_alignment(tokens: int) -> Alignment:
    """The alignment of a sequence of `tokens` tokens with itself, for two sides with the same tokenizer."""
    index = np.arange(tokens)
    return Alignment(index, index, np.ones(max(tokens - 1, 0), dtype=bool))


def _boundaries(offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Characters at which a token ends and no later token begins before: positions (unique, sorted) and token indices.

    Tokens that share a character (the bytes of an emoji) thus have one boundary, after the last of them.
    """
    offsets = offsets.reshape(-1, 2).astype(np.int64)
    if not len(offsets):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    starts, ends = offsets[:, 0], offsets[:, 1]
    read = np.maximum.accumulate(ends)
    begins = np.where(ends > starts, starts, _BEYOND_TEXT)
    next_begin = np.append(np.minimum.accumulate(begins[::-1])[::-1][1:], _BEYOND_TEXT)
    clean = (ends == read) & (next_begin >= read)
    if ends[-1] <= starts[-1]:
        read[-1] += _BEYOND_TEXT
        clean[-1] = True
    tokens = np.flatnonzero(clean)
    positions = read[tokens]
    last_of_equal = np.diff(positions, append=-1) != 0
    return positions[last_of_equal], tokens[last_of_equal]


# -------------------------------------------------------------------------------------------------------------- batches


def token_weights(offsets: np.ndarray, character_weights: np.ndarray) -> np.ndarray:
    """Weight of every token as a target: that of its last character, so a token that leads into the completion counts.

    Args:
        offsets: integers [T, 2], as for `align_offsets`.
        character_weights: floats [characters of the text], 0 = does not count.

    Returns:
        float32 [T]. A zero-width last token (end-of-sequence) has the weight of the text's last character. All zero for
        an empty text. The weight of the first token is meaningless, as nothing predicts it.
    """
    offsets = np.asarray(offsets).reshape(-1, 2)
    if not len(offsets) or not len(character_weights):
        return np.zeros(len(offsets), np.float32)
    last = np.clip(offsets[:, 1] - 1, 0, len(character_weights) - 1)
    if offsets[-1, 1] <= offsets[-1, 0]:
        last[-1] = len(character_weights) - 1
    return np.asarray(character_weights, np.float32)[last]


@dataclass(frozen=True)
class AlignedBatch:
    """What the losses need to know about a batch of B documents, as positions in the flattened [B*T] batch.

    A position is the token that *predicts*; its target is the next token. N positions count in the loss.

    Attributes:
        student_index: int64 [N], increasing.
        weights: float32 [N], > 0.
        teacher_index: int64 [N], the teacher's position to compare distributions with, -1 where there is none.
        student_chunk: int64 [N], the chunk (0..C-1) that the target is part of, -1 for none.
        chunk_teacher_index: int64 [M], the teacher's positions whose targets make up chunks.
        teacher_chunk: int64 [M], the chunk of each.
        chunk_weights: float32 [C].
    """

    student_index: Tensor
    weights: Tensor
    teacher_index: Tensor
    student_chunk: Tensor
    chunk_teacher_index: Tensor
    teacher_chunk: Tensor
    chunk_weights: Tensor

    def to(self, device: torch.device | str) -> AlignedBatch:
        """A copy with its tensors on `device`."""
        fields = (getattr(self, field.name) for field in dataclasses.fields(self))
        return AlignedBatch(*(tensor.to(device, non_blocking=True) for tensor in fields))


def collate(
    alignments: Sequence[Alignment], weights: Sequence[np.ndarray], student_length: int, teacher_length: int
) -> AlignedBatch:
    """Join the alignments of B documents into one batch, padded on the right to `student_length` and `teacher_length`.

    Args:
        alignments: one a document.
        weights: the student's `token_weights`, one array [Ts] a document.

    Distributions are compared at the start of `single` chunks. At any other boundary the two sides can not even express
    each other's next token, and comparing would push the student away from its own tokenization; those chunks are
    compared as wholes, if all of their student tokens count.
    """
    columns: list[list[np.ndarray]] = [[] for _ in range(7)]
    chunks = 0
    for row, (alignment, weight) in enumerate(zip(alignments, weights, strict=True)):
        document = _document(alignment, np.asarray(weight, np.float32))
        student, _, teacher, student_chunk, chunk_teacher, teacher_chunk, chunk_weight = document
        student += row * student_length
        teacher[teacher >= 0] += row * teacher_length
        chunk_teacher += row * teacher_length
        student_chunk[student_chunk >= 0] += chunks
        teacher_chunk += chunks
        chunks += len(chunk_weight)
        for column, values in zip(columns, document, strict=True):
            column.append(values)
    return AlignedBatch(*(torch.from_numpy(np.concatenate(column)) for column in columns))


def _document(alignment: Alignment, weight: np.ndarray) -> tuple[np.ndarray, ...]:
    """The fields of AlignedBatch, in their order, for one document."""
    target_weight = np.append(weight[1:], np.float32(0))  # of the token that each position predicts
    student, teacher, single = alignment.student_index, alignment.teacher_index, alignment.single
    teacher_of = np.full(len(weight), -1)
    teacher_of[student[:-1][single]] = teacher[:-1][single]

    counted = np.append(0, np.cumsum(target_weight > 0))
    complete = counted[student[1:]] - counted[student[:-1]] == np.diff(student)
    chosen = np.flatnonzero(~single & complete)
    student_positions, student_owner = _ranges(student[chosen], student[chosen + 1])
    teacher_positions, teacher_owner = _ranges(teacher[chosen], teacher[chosen + 1])
    chunk_of = np.full(len(weight), -1)
    chunk_of[student_positions] = student_owner

    kept = np.flatnonzero(target_weight > 0)
    chunk_weight = target_weight[student[chosen + 1] - 1]
    return (
        kept,
        target_weight[kept],
        teacher_of[kept],
        chunk_of[kept],
        teacher_positions,
        teacher_owner,
        chunk_weight,
    )


def _ranges(starts: np.ndarray, stops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Concatenation of `range(start, stop)`, and for each element the number of its range."""
    owner = np.repeat(np.arange(len(starts)), stops - starts)
    first = np.cumsum(stops - starts) - (stops - starts)
    return np.arange(len(owner)) - first[owner] + starts[owner], owner
