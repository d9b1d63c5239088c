"""FedKMT, after FedMKT (Fan et al., COLING 2025, arXiv 2406.02224): knowledge moves through final logits alone.

What is theirs: tokens and vocabularies are matched by minimum edit distance (MinED); of a teacher only the K
highest logits are used, mapped to the student's vocabulary and normalised; the student learns them by
cross-entropy; and only on texts that the best teacher finds less surprising than the student does itself
(DualMinCE). Facts of the public
code:
FederatedAI/FATE-LLM, `python/fate_llm/algo/fedmkt`. What one-shot fusion changes:

- Which teacher is best for a text is known beforehand: `Document.teacher`.
- Student and teacher are compared in every step rather than once a round, by their nats for the same characters
  rather than per token, which would favour the tokenizer that cuts finer.
- Where a student's token matches no teacher's, theirs has the one-hot of the token at hand; here it is that of the
  token to be predicted, which is what the position learns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deepfusion.learning.align import AlignedBatch, SharedVocabulary
from deepfusion.learning.distillation import Distiller, Group, LossWeights, Teacher
from deepfusion.models.loading import load_tokenizer
from deepfusion.schema import Config
from deepfusion.sections import Section, VAASection
from deepfusion_bench.baselines.shared import distill_with, in_blocks, teacher_output, weighed, weighted_mean

CANDIDATES = 256
"""Tokens of the student's vocabulary whose edit distance to a token of the teacher's is computed."""
_FEATURES = 512


class FedKMTSettings(Section):
    """What the config has no key for; `distill.ce_weight` is their lambda (0.9), `distill.beta` their 1 - lambda
    (0.1).
    """

    top_k: int = Field(
        128, ge=1, description="highest logits of the teacher that are kept at a position (their default)"
    )


DEFAULTS = FedKMTSettings()


def run(
    config: Config, inputs: dict[str, Path], out: Path, settings: FedKMTSettings = DEFAULTS
) -> dict[str, Any]:
    """`stages.distill.run` by FedKMT. With `distill.trunk_share` 1 one student learns from all proxies, as on their
    server.
    """
    return distill_with(partial(FedKMT, settings=settings), config, inputs, out)


# ---------------------------------------------------------------------------------------------------- minimum edit
# distance


def edit_distances(first: Sequence[str], second: Sequence[str]) -> np.ndarray:
    """int16 [N]: the Levenshtein distances of N pairs of strings, row by row of the table for all pairs at once."""
    return _distances(*_codes(first), *_codes(second))


def _codes(strings: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Code points, int32 [N, L], padded with 0; and lengths, int64 [N]."""
    lengths = np.fromiter(map(len, strings), np.int64, len(strings))
    codes = np.zeros((len(strings), int(lengths.max(initial=0))), np.int32)
    codes[np.arange(codes.shape[1]) < lengths[:, None]] = np.fromiter(map(ord, "".join(strings)), np.int32)
    return codes, lengths


def _distances(
    first: np.ndarray, first_lengths: np.ndarray, second: np.ndarray, second_lengths: np.ndarray
) -> np.ndarray:
    columns = np.arange(second.shape[1] + 1, dtype=np.int16)
    row = np.broadcast_to(columns, (len(second), len(columns)))
    found = second_lengths.astype(np.int16)
    pairs = np.arange(len(second))
    for i in range(first.shape[1]):
        changed = row[:, :-1] + (second != first[:, i, None])
        step = np.concatenate(
            [np.full((len(second), 1), i + 1, np.int16), np.minimum(row[:, 1:] + 1, changed)], 1
        )
        # An insertion costs 1 a column: the running minimum of what is left after taking that away.
        row = np.minimum.accumulate(step - columns, axis=1) + columns
        found = np.where(first_lengths == i + 1, row[pairs, second_lengths], found)
    return found.astype(np.int16)


def surfaces(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Every token by its id, with "Ġ" and "▁" read as the space they mean; "" for special tokens and unused ids."""
    vocabulary = tokenizer.get_vocab()
    found = [""] * (max(vocabulary.values(), default=-1) + 1)
    special = set(tokenizer.all_special_ids)
    for token, id_ in vocabulary.items():
        if id_ not in special:
            found[id_] = token.replace("Ġ", " ").replace("▁", " ")
    return found


def vocabulary_map(
    student: Sequence[str], teacher: Sequence[str], shared: SharedVocabulary, candidates: int = CANDIDATES
) -> np.ndarray:
    """The student's token nearest to each of the teacher's: int64 [teacher's tokens], -1 for tokens without text.

    Args:
        student, teacher: `surfaces` of both.
        shared: tokens that are the same, mapped to each other.
        candidates: for each of the others, how many tokens are compared: those that share most characters, hence whose
            distance can be smallest. Among equally near ones the smallest id wins.
    """
    mapped = np.full(len(teacher), -1)
    mapped[shared.teacher_ids.cpu().numpy()] = shared.student_ids.cpu().numpy()
    missing = np.array([id_ for id_, token in enumerate(teacher) if token and mapped[id_] < 0], np.int64)
    known = np.array([id_ for id_, token in enumerate(student) if token], np.int64)
    if not len(known):
        return mapped
    codes, lengths = _codes([student[id_] for id_ in known])
    bags = _bags([student[id_] for id_ in known])
    candidates = min(candidates, len(known))
    for first in range(0, len(missing), 64):
        ids = missing[first : first + 64]
        tokens = [teacher[id_] for id_ in ids]
        own_codes, own_lengths = _codes(tokens)
        least = np.maximum(own_lengths[:, None], lengths) - _bags(tokens) @ bags.T
        near = np.sort(np.argpartition(least, candidates - 1, axis=1)[:, :candidates], axis=1)
        pairs = np.repeat(np.arange(len(ids)), candidates), near.ravel()
        distances = _distances(own_codes[pairs[0]], own_lengths[pairs[0]], codes[pairs[1]], lengths[pairs[1]])
        best = distances.reshape(near.shape).argmin(1)
        mapped[ids] = known[near[np.arange(len(ids)), best]]
    return mapped


def _bags(tokens: Sequence[str]) -> np.ndarray:
    """float32 [N, features]: the product of two rows is the number of characters that two tokens have in common.

    The n-th occurrence of a character is a feature of its own. Folded to a fixed width, as vocabularies hold
    thousands of
    characters: two that fall together only spoil the choice of candidates.
    """
    bags = np.zeros((len(tokens), _FEATURES), np.float32)
    for row, token in enumerate(tokens):
        for character, count in Counter(token).items():
            bags[row, [(ord(character) + 131 * n) % _FEATURES for n in range(count)]] = 1
    return bags


def align_tokens(costs: np.ndarray) -> np.ndarray:
    """The cheapest monotone path through two sequences (dynamic time warping, FedMKT's dynamic programming).

    Args:
        costs: [Ts, Tt], both at least 1.

    Returns:
        int64 [Ts]: the one partner of each of the student's tokens, -1 where it has several.
    """
    rows, columns = costs.shape
    total = np.full((rows + 1, columns + 1), np.inf)
    total[0, 0] = 0
    for diagonal in range(rows + columns - 1):
        i = np.arange(max(0, diagonal - columns + 1), min(rows, diagonal + 1))
        j = diagonal - i
        total[i + 1, j + 1] = costs[i, j] + np.minimum(
            np.minimum(total[i, j], total[i, j + 1]), total[i + 1, j]
        )
    partner = np.full(rows, -1)
    partners = np.zeros(rows, np.int64)
    i, j = rows, columns
    while i and j:
        partner[i - 1] = j - 1
        partners[i - 1] += 1
        before = total[i - 1, j - 1], total[i - 1, j], total[i, j - 1]
        move = before.index(min(before))
        i, j = i - (move != 2), j - (move != 1)
    return np.where(partners == 1, partner, -1)


class MinED:
    """The matching of one teacher's tokens and vocabulary with the student's.

    Attributes:
        to_student: int64 [width of the teacher's output layer], see `vocabulary_map`.
    """

    def __init__(self, student: PreTrainedTokenizerBase, teacher: Teacher, width: int) -> None:
        self.identical = teacher.vocabulary.identical
        tokens = surfaces(student), surfaces(teacher.tokenizer)
        mapped = vocabulary_map(*tokens, teacher.vocabulary)
        self.map = np.pad(mapped, (0, max(width - len(mapped), 0)), constant_values=-1)[:width]
        self.to_student = torch.from_numpy(self.map).to(teacher.vocabulary.student_ids.device)
        self.bare = [[token.replace(" ", "") for token in side] for side in tokens]
        self.known: dict[tuple[bytes, bytes], np.ndarray] = {}

    def __call__(self, student_ids: np.ndarray, teacher_ids: np.ndarray) -> np.ndarray:
        """int64 [Ts]: the teacher's token that matches each of the student's of one text, -1 where none does.

        Two match if the one is the only partner of the other on the cheapest path, and the vocabulary map sends it
        there.
        """
        if self.identical:
            return np.where(np.arange(len(student_ids)) < len(teacher_ids), np.arange(len(student_ids)), -1)
        key = student_ids.tobytes(), teacher_ids.tobytes()
        if key not in self.known:
            partner = align_tokens(self._costs(student_ids, teacher_ids))
            self.known[key] = np.where(self.map[teacher_ids[partner]] == student_ids, partner, -1)
            self.known[key][partner < 0] = -1
        return self.known[key]

    def _costs(self, student_ids: np.ndarray, teacher_ids: np.ndarray) -> np.ndarray:
        """Edit distances [Ts, Tt] of all tokens, without the space before them; each pair of different tokens once."""
        (own, own_at), (theirs, their_at) = (
            np.unique(ids, return_inverse=True) for ids in (student_ids, teacher_ids)
        )
        first, second = (
            _codes([self.bare[0][id_] for id_ in own]),
            _codes([self.bare[1][id_] for id_ in theirs]),
        )
        i, j = np.repeat(np.arange(len(own)), len(theirs)), np.tile(np.arange(len(theirs)), len(own))
        distances = _distances(first[0][i], first[1][i], second[0][j], second[1][j])
        return distances.reshape(len(own), len(theirs))[own_at[:, None], their_at]


# -------------------------------------------------------------------------------------------------------------------
# losses


def top_knowledge(
    logits: Tensor, to_student: Tensor, top_k: int, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """A teacher's highest logits as a distribution over the student's tokens.

    Args:
        logits: float32 [n, Vt].
        to_student: int64 [Vt], the student's token for each, -1 for none.
        temperature: softens the teacher alone, as theirs does.

    Returns:
        ids int64 [n, K] and probabilities float32 [n, K]. Of several logits that fall on one token the highest
        counts. A row sums to 1, or to 0 where none of its tokens has a counterpart.
    """
    values, ids = logits.topk(min(top_k, logits.shape[-1]))
    ids, order = to_student[ids].sort(
        dim=-1, stable=True
    )  # stable: of equal ids the highest logit comes first
    repeated = F.pad(ids[:, 1:] == ids[:, :-1], (1, 0))
    values = values.gather(-1, order).masked_fill(repeated | (ids < 0), -torch.inf)
    return ids.clamp_min(0), (values / temperature).softmax(-1).nan_to_num(0.0)


class FedKMT(Distiller):
    """Student, teachers and FedKMT's loss; made and called like `Distiller`, whose VAA and chunks take no part.

    Of what it returns `kl` is the cross-entropy with the teachers' distributions (same gradient as the divergence), and
    `taught` the share of the tokens that a teacher taught.
    """

    def __init__(
        self, student: PreTrainedModel, weights: LossWeights, teachers: dict[int, Teacher],
        vaa: VAASection | None = None,
        seed: int = 0, settings: FedKMTSettings = DEFAULTS,
    ) -> None:  # fmt: skip
        super().__init__(student, replace(weights, alpha=0.0, chunk=0.0), teachers, None, seed)
        self.settings = settings
        tokenizer = load_tokenizer(str(student.name_or_path))  # read from where the student is from
        self.mined = {
            number: MinED(tokenizer, teacher, len(teacher.model.get_output_embeddings().weight))
            for number, teacher in teachers.items()
        }

    def group_losses(
        self, group: Group, states: list[Tensor], input_ids: Tensor, head: Any
    ) -> dict[str, Tensor]:
        if group.teacher is None or not self.weights.beta:
            return super().group_losses(group, states, input_ids, head)
        rows, aligned = group.rows.to(input_ids.device), group.aligned.to(input_ids.device)
        ids = input_ids[rows]
        known, shares, teacher_log_probs = self._ask(group)
        partner = self._partners(group, ids, aligned.student_index)
        hidden = states[-1][rows].flatten(0, 1)[aligned.student_index]
        targets = ids.flatten()[aligned.student_index + 1]

        def block(hidden: Tensor, targets: Tensor, partner: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            log_p = F.linear(hidden, head.weight, getattr(head, "bias", None)).float().log_softmax(-1)
            log_probs = log_p.gather(-1, targets[:, None]).squeeze(-1)
            share = shares[partner.clamp_min(0)] * (partner >= 0)[:, None]
            taught = (share * log_p.gather(-1, known[partner.clamp_min(0)])).sum(-1)
            # What no teacher has a say in is the label's.
            transfer = -taught - (1 - share.sum(-1)) * log_probs
            return log_probs, (log_p.detach().argmax(-1) == targets).float(), transfer

        log_probs, correct, transfer = in_blocks(block, len(head.weight), hidden, targets, partner)
        better = _better_teacher(aligned, log_probs.detach(), teacher_log_probs, ids.shape)
        chosen = better[aligned.student_index // ids.shape[1]].float()
        found = {
            "ce": weighted_mean(-log_probs, aligned.weights),
            "kl": weighted_mean(transfer * chosen, aligned.weights),
            "chunk": transfer.new_zeros(()),
            "accuracy": weighted_mean(correct, aligned.weights),
            "taught": weighted_mean(chosen, aligned.weights),
        }
        return {"loss": weighed(found, self.coefficients(group)), **found}

    @torch.no_grad()
    def _ask(self, group: Group) -> tuple[Tensor, Tensor, Tensor]:
        """What the teacher says at each of its flat positions: `top_knowledge`, and the log-probability of its next
        token.
        """
        assert group.teacher is not None
        mined = self.mined[group.teacher]
        output, ids, mask = teacher_output(self.teachers[group.teacher], group, self.student.device)

        def block(positions: Tensor, following: Tensor) -> tuple[Tensor, ...]:
            logits = output.logits(positions)
            log_probs = logits.gather(-1, following[:, None]).squeeze(-1) - logits.logsumexp(-1)
            return *top_knowledge(
                logits, mined.to_student, self.settings.top_k, self.weights.temperature
            ), log_probs

        real = mask.flatten().nonzero().squeeze(-1)
        said = in_blocks(block, len(output.weight), real, ids.roll(-1, 1).flatten()[real])
        known, shares, log_probs = (
            part.new_zeros(mask.numel(), *part.shape[1:]).index_copy(0, real, part) for part in said
        )
        return known, shares, log_probs

    def _partners(self, group: Group, student_ids: Tensor, counted: Tensor) -> Tensor:
        """int64 [N]: the teacher's flat position that matches each counted position of the student, -1 where none
        does.
        """
        assert group.teacher is not None
        assert group.teacher_ids is not None
        assert group.teacher_mask is not None
        ids, teacher_ids = student_ids.cpu().numpy(), group.teacher_ids.cpu().numpy()
        lengths = group.teacher_mask.sum(1).tolist()
        positions = counted.cpu().numpy()
        row, column = np.divmod(positions, ids.shape[1])
        found = np.full(len(positions), -1)
        for document in np.unique(row):
            here = row == document
            read = column[here].max() + 2  # up to the last token that counts
            partner = self.mined[group.teacher](
                ids[document, :read], teacher_ids[document, : lengths[document]]
            )[column[here]]
            found[here] = np.where(partner >= 0, partner + document * teacher_ids.shape[1], -1)
        return torch.from_numpy(found).to(counted.device)


def _better_teacher(
    aligned: AlignedBatch, student_log_probs: Tensor, teacher_log_probs: Tensor, shape: torch.Size
) -> Tensor:
    """bool [B]: whether the teacher finds a text less surprising than the student, over the characters both were
    asked for.

    Args:
        student_log_probs: [N], of the targets at `aligned.student_index`.
        teacher_log_probs: [B*Tt], of the token after each of the teacher's positions.
        shape: (B, Ts).
    """
    documents, length = shape
    same = (aligned.teacher_index >= 0) | (aligned.student_chunk >= 0)
    theirs = torch.cat([aligned.teacher_index[aligned.teacher_index >= 0], aligned.chunk_teacher_index])
    empty = student_log_probs.new_zeros(documents)
    own_sum = empty.index_add(0, aligned.student_index[same] // length, student_log_probs[same])
    their_sum = empty.index_add(0, theirs // (len(teacher_log_probs) // documents), teacher_log_probs[theirs])
    return their_sum > own_sum
