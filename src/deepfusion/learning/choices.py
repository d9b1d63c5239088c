"""Multiple-choice accuracy as lm-evaluation-harness 0.4 defines it: `acc` and `acc_norm` of its Hugging Face causal
models.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from deepfusion.text.sources import Document

# One [rows, tokens, vocabulary] block of logits holds at most so many numbers (1 GiB in fp32), whatever the batch size.
LOGITS_PER_FORWARD = 2**28


class Verdict(NamedTuple):
    """Whether the model chose the right option of one question: by likelihood, and by likelihood per character."""

    acc: bool
    acc_norm: bool


def judge_choices(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Document],
    *,
    batch_size: int,
) -> list[Verdict]:
    """The model's choice on every question, each a document with `options`; the first option wins a tie.

    Context and choice are what a task of the harness with `target_delimiter: " "` and no chat template would hold: the
    prompt, and the option without the one space it begins with. `acc_norm` divides by the characters of the choice.

    Args:
        batch_size: options per forward pass; fewer where their logits would not fit.
    """
    pairs = [
        encode_pair(tokenizer, question.prompt, option)
        for question in questions
        for option in question.options
    ]
    found = iter(log_likelihoods(model, pairs, batch_size, reading_limit(model, tokenizer)))
    verdicts = []
    for question in questions:
        scores = np.array([next(found) for _ in question.options])
        sizes = np.array([max(len(option.removeprefix(" ")), 1) for option in question.options], float)
        chosen, chosen_norm = int(scores.argmax()), int((scores / sizes).argmax())
        verdicts.append(Verdict(chosen == question.answer, chosen_norm == question.answer))
    return verdicts


def encode_pair(
    tokenizer: PreTrainedTokenizerBase, context: str, continuation: str
) -> tuple[list[int], list[int]]:
    """Token ids of both parts as the harness cuts them (`TemplateLM._encode_pair` and `loglikelihood`).

    Spaces at the end of the context go to the continuation. Both are encoded together, with the special tokens that the
    tokenizer adds by itself, and cut after as many tokens as the context alone has, which may lie inside a word.
    """
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if not context:
        ids = tokenizer.encode(continuation, add_special_tokens=False)
        return (ids[:1], ids[1:]) if ids and ids[0] == start else ([start], ids)
    # A prompt that begins with the start mark in writing gets no second one.
    marked = start is not None and context.startswith(str(tokenizer.decode([start])))
    whole, alone = (
        tokenizer.encode(text, **({"add_special_tokens": False} if marked else {}))
        for text in (context + continuation, context.rstrip())
    )
    return whole[: len(alone)], whole[len(alone) :]


def reading_limit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """The most tokens that the harness lets a model read (`resolve_max_length`); longer contexts lose their
    beginning.
    """
    config = model.config.get_text_config()
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        if getattr(config, name, None) is not None:
            return int(getattr(config, name))
    declared = tokenizer.model_max_length
    return 2048 if declared == VERY_LARGE_INTEGER else int(declared)


def log_likelihoods(
    model: PreTrainedModel, pairs: Sequence[tuple[list[int], list[int]]], batch_size: int, limit: int
) -> list[float]:
    """Natural log-likelihood of each continuation after its context, summed over its tokens.

    Args:
        limit: the most tokens that the model reads; what it reads last can still predict one more.
    """
    found = [0.0] * len(pairs)
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    training = model.training
    model.eval()
    for batch in _batches(pairs, batch_size, limit, model.config.get_text_config().vocab_size):
        # The last token is never read, only predicted. Padding on the right is seen by no token before it.
        ends = [len(ids) - 1 for _, ids, _ in batch]
        inputs, mask = (torch.zeros(len(batch), max(ends), dtype=torch.long) for _ in range(2))
        for i, (_, ids, _) in enumerate(batch):
            inputs[i, : ends[i]] = torch.tensor(ids[:-1])
            mask[i, : ends[i]] = 1
        first = min(end - count for end, (_, _, count) in zip(ends, batch, strict=True))
        kept = {"logits_to_keep": max(ends) - first} if keeps else {}
        with torch.inference_mode():
            arguments = {"input_ids": inputs.to(model.device), "attention_mask": mask.to(model.device)}
            logits = model(**arguments, use_cache=False, **kept).logits
            skipped = max(ends) - logits.shape[1]
            for i, (place, ids, count) in enumerate(batch):
                predicted = logits[i, ends[i] - count - skipped : ends[i] - skipped].float().log_softmax(-1)
                truth = torch.tensor(ids[len(ids) - count :], device=predicted.device)
                found[place] = float(predicted.gather(1, truth[:, None]).double().sum())
    model.train(training)
    return found


def _batches(
    pairs: Sequence[tuple[list[int], list[int]]], batch_size: int, limit: int, vocabulary: int
) -> Iterator[list[tuple[int, list[int], int]]]:
    """(place, token ids, number of them that count), of similar length together, the longest first."""
    rows = []
    for place, (context, continuation) in enumerate(pairs):
        ids = [*context, *continuation][-(limit + 1) :]
        rows.append((place, ids, min(len(continuation), len(ids) - 1)))
    batch: list[tuple[int, list[int], int]] = []
    for row in sorted((row for row in rows if row[2]), key=lambda row: len(row[1]), reverse=True):
        if batch and (
            len(batch) == batch_size or (len(batch) + 1) * len(batch[0][1]) * vocabulary > LOGITS_PER_FORWARD
        ):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
