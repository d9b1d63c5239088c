"""Multiple-choice accuracy as lm-evaluation-harness 0.4 defines it: `acc` and `acc_norm` of its Hugging Face causal
models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from deepfusion.learning.scoring import Row, score
from deepfusion.text.rows import Document


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
    pairs = [[encode_pair(tokenizer, q.prompt, option) for option in q.options] for q in questions]
    found = log_likelihoods(model, pairs, batch_size, reading_limit(model, tokenizer))
    verdicts = []
    for question, likelihoods in zip(questions, found, strict=True):
        scores = np.array(likelihoods)
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
    model: PreTrainedModel,
    questions: Sequence[Sequence[tuple[list[int], list[int]]]],
    batch_size: int,
    limit: int,
) -> list[list[float]]:
    """Natural log-likelihood of each continuation after its context, summed over its tokens, question by question.

    Args:
        limit: the most tokens that the model reads; what it reads last can still predict one more.
    """
    groups = [[_row(*pair, limit) for pair in question] for question in questions]
    score(model, groups, batch_size)
    return [[-row.nats for row in group] for group in groups]


def _row(context: list[int], continuation: list[int], limit: int) -> Row:
    ids = np.array([*context, *continuation][-(limit + 1) :], np.int64)
    counted = np.arange(len(ids)) >= max(len(ids) - len(continuation), 1)
    return Row(ids, counted)
