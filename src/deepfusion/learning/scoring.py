"""Log-likelihoods of sequences: what several of them begin with is read once, and nothing is predicted in vain."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, PreTrainedModel

# One [rows, tokens, vocabulary] block of logits holds at most so many numbers (1 GiB in fp32), whatever the batch size.
LOGITS_PER_FORWARD = 2**28
LEAST_SHARED = 8
"""A shorter beginning is read with each sequence: a second pass costs more."""


@dataclass(slots=True)
class Row:
    """One sequence to score.

    Attributes:
        input_ids: int64 [T].
        counted: bool [T], the tokens that count as targets; never the first.
        size: UTF-8 bytes of what counts.
        nats: found by `score`, the negative log-likelihood of what counts.
        correct: found by `score`, how many of these tokens were the likeliest.
    """

    input_ids: np.ndarray
    counted: np.ndarray
    size: int = 0
    nats: float = 0.0
    correct: int = 0

    @property
    def tokens(self) -> int:
        return int(self.counted.sum())


@torch.inference_mode()
def score(model: PreTrainedModel, groups: Iterable[Sequence[Row]], batch_size: int) -> None:
    """Fill in `nats` and `correct` of every row; the last token of a row is predicted, never read.

    Args:
        groups: rows that may begin alike, such as a question with each of its options.
        batch_size: rows per forward pass; fewer where their logits would not fit.
    """
    training = model.training
    model.eval()
    alone: list[Row] = []
    shared: dict[int, list[tuple[int, Sequence[Row]]]] = {}
    for group in groups:
        rows = [row for row in group if row.tokens]
        length = _shared(rows) if len(rows) > 1 else 0
        if length < LEAST_SHARED or not _remembers(model, max(len(row.input_ids) for row in rows)):
            alone += rows
        else:
            shared.setdefault(len(rows), []).append((length, rows))
    vocabulary = model.config.get_text_config().vocab_size
    for batch in batches(alone, batch_size, vocabulary):
        _score_alone(model, batch)
    for options, found in shared.items():
        for some in _group_batches(found, max(batch_size // options, 1), options * vocabulary):
            _score_shared(model, some)
    model.train(training)


def batches(rows: Sequence[Row], batch_size: int, vocabulary: int) -> Iterator[list[Row]]:
    """Rows of similar length together, the longest first so that memory peaks at once."""
    batch: list[Row] = []
    for row in sorted(rows, key=lambda row: len(row.input_ids), reverse=True):
        kept = _kept([*batch, row])
        if batch and (len(batch) == batch_size or (len(batch) + 1) * kept * vocabulary > LOGITS_PER_FORWARD):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def padded(sequences: Sequence[np.ndarray], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids and attention mask, both int64 [rows, tokens]."""
    longest = max(map(len, sequences))
    ids, mask = (np.zeros((len(sequences), longest), np.int64) for _ in range(2))
    for i, sequence in enumerate(sequences):
        ids[i, : len(sequence)] = sequence
        mask[i, : len(sequence)] = 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


def _kept(batch: Sequence[Row]) -> int:
    """At how many last positions logits are needed: prompts stand first, and nobody asks how they were predicted."""
    longest = max(len(row.input_ids) for row in batch)
    first = min((int(row.counted.argmax()) for row in batch if row.tokens), default=longest)
    return max(longest - first, 1)


def _score_alone(model: PreTrainedModel, batch: list[Row]) -> None:
    ids, mask = padded([row.input_ids[:-1] for row in batch], model.device)
    kept = {"logits_to_keep": _kept(batch)} if _takes(model, "logits_to_keep") else {}
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **kept).logits
    for row, own in zip(batch, logits, strict=True):
        _count(row, own, logits.shape[1] - ids.shape[1])


def _score_shared(model: PreTrainedModel, groups: Sequence[tuple[int, Sequence[Row]]]) -> None:
    """Groups of as many rows each. All that they begin with is read but its last token, which, read with each row,
    predicts the first token that they do not share.
    """
    options = len(groups[0][1])
    begun, read = padded([rows[0].input_ids[: length - 1] for length, rows in groups], model.device)
    memory = DynamicCache()
    model.base_model(input_ids=begun, attention_mask=read, past_key_values=memory, use_cache=True)
    memory.batch_repeat_interleave(options)
    starts = torch.tensor([length - 1 for length, _ in groups], device=model.device).repeat_interleave(
        options
    )
    each = [(length, row) for length, rows in groups for row in rows]
    ids, mask = padded([row.input_ids[length - 1 : -1] for length, row in each], model.device)
    places = {"position_ids": starts[:, None] + torch.arange(ids.shape[1], device=model.device)}
    logits = model(
        input_ids=ids,
        attention_mask=torch.cat([read.repeat_interleave(options, 0), mask], 1),
        past_key_values=memory,
        use_cache=True,
        **(places if _takes(model, "position_ids") else {}),
    ).logits
    for (length, row), own in zip(each, logits, strict=True):
        _count(row, own, 1 - length)


def _count(row: Row, logits: torch.Tensor, shift: int) -> None:
    """`logits[t + shift]` [T, V] predicts the token after t."""
    targets = np.flatnonzero(row.counted)
    if not len(targets):
        return
    picked = logits[torch.from_numpy(targets - 1 + shift)].float()
    truth = torch.from_numpy(row.input_ids[targets]).to(picked.device)
    row.nats = cross_entropy(picked, truth, reduction="none").double().sum().item()
    row.correct = int((picked.argmax(-1) == truth).sum())


def _shared(rows: Sequence[Row]) -> int:
    """With how many tokens all rows begin, none of which counts; each has one more."""
    length = min(int(row.counted.argmax()) for row in rows)
    first = rows[0].input_ids[:length]
    for row in rows[1:]:
        differs = np.flatnonzero(first[:length] != row.input_ids[:length])
        length = int(differs[0]) if len(differs) else length
    return length


def _group_batches(
    groups: Sequence[tuple[int, Sequence[Row]]], size: int, logits: int
) -> Iterator[list[tuple[int, Sequence[Row]]]]:
    """At most `size` groups together whose beginnings are about as long, the longest first; `logits` a position."""
    batch: list[tuple[int, Sequence[Row]]] = []
    longest = 0
    for length, rows in sorted(groups, key=lambda group: group[0], reverse=True):
        own = max(len(row.input_ids) for row in rows) - length
        if batch and (
            len(batch) == size or (len(batch) + 1) * max(longest, own) * logits > LOGITS_PER_FORWARD
        ):
            yield batch
            batch, longest = [], 0
        batch.append((length, rows))
        longest = max(longest, own)
    if batch:
        yield batch


def _remembers(model: PreTrainedModel, tokens: int) -> bool:
    """Whether a model can go on from keys and values of as many tokens, all of which it sees."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    stateful = getattr(model, "_is_stateful", False)
    return not stateful and _takes(model, "past_key_values") and (window is None or window > 2 * tokens)


def _takes(model: PreTrainedModel, argument: str) -> bool:
    return argument in inspect.signature(model.forward).parameters
