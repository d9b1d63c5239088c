"""Tokens of a document, with the characters that each stands for and its weight as a target."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from deepfusion.errors import InputError
from deepfusion.text.chat import chat_template, places, render
from deepfusion.text.rows import Document


class Encoded(NamedTuple):
    """Tokens of one example.

    Attributes:
        input_ids: int64 [T].
        offsets: int32 [T, 2], the characters of `document.text` that a token stands for; equal ends for marks.
        weights: float32 [T], the loss weight of each token as a target.
        template: the chat template that wrote the text; empty for plain text.
    """

    input_ids: np.ndarray
    offsets: np.ndarray
    weights: np.ndarray
    template: str = ""


def encode(
    tokenizer: PreTrainedTokenizerBase,
    document: Document,
    prompt_weight: float = 0.0,
    max_tokens: int | None = None,
    add_end: bool = True,
) -> Encoded:
    """Tokenize a document as one text, with a start mark and, by default, an end mark.

    The start mark (BOS, else EOS) weighs 0, what is learned and the end mark 1, all else `prompt_weight`. A token that
    straddles the border belongs to what is learned. Longer sequences than `max_tokens` are cut on the right.

    A conversation is read as the tokenizer's own chat template writes it, where it has one; the marks are then the
    template's, and every learned turn ends with one.

    Raises:
        InputError: no character offsets (a slow tokenizer), no special token to mark start and end, or turns that
            the chat template cannot write.
    """
    where = tokenizer.name_or_path
    if not tokenizer.is_fast:
        what = "the tokenizer gives no character offsets"
        raise InputError(what, where=where, allowed="fast tokenizers", code="slow-tokenizer")
    if document.turns and chat_template(tokenizer):
        encoded = _encode_chat(tokenizer, document, prompt_weight, add_end)
    else:
        encoded = _encode_plain(tokenizer, document, prompt_weight, add_end)
    ids, offsets, weights, template = encoded
    return Encoded(ids[:max_tokens], offsets[:max_tokens], weights[:max_tokens], template)


def _encode_plain(
    tokenizer: PreTrainedTokenizerBase, document: Document, prompt_weight: float, add_end: bool
) -> Encoded:
    end_mark = tokenizer.eos_token_id
    start_mark = end_mark if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if start_mark is None or (add_end and end_mark is None):
        raise InputError(
            "the tokenizer has no end-of-text token", where=tokenizer.name_or_path, code="no-end-token"
        )
    text = document.text
    tokens = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False
    )
    marks = [(0, 0)], [(len(text), len(text))] if add_end else []
    ids = [start_mark, *tokens["input_ids"], *([end_mark] if add_end else [])]
    offsets = np.array([*marks[0], *tokens["offset_mapping"], *marks[1]], np.int32).reshape(-1, 2)
    weights = np.full(len(ids), prompt_weight, np.float32)
    for start, end in document.learned:
        weights[(offsets[:, 1] > start) & ((offsets[:, 0] < end) | (offsets[:, 1] == end))] = 1.0
    weights[0] = 0.0
    if add_end:
        weights[-1] = 1.0
    return Encoded(np.array(ids, np.int64), offsets, weights)


def _encode_chat(
    tokenizer: PreTrainedTokenizerBase, document: Document, prompt_weight: float, add_end: bool
) -> Encoded:
    rendered = render(tokenizer, document)
    tokens = tokenizer(
        rendered.text, add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False
    )
    begins, ends = np.array(tokens["offset_mapping"], np.int64).reshape(-1, 2).T
    starts_at, ends_at = places(document, rendered)
    first = starts_at[np.minimum(begins, len(starts_at) - 1)]
    last = np.maximum(ends_at[np.maximum(ends - 1, 0)], first)
    weights = np.full(len(begins), prompt_weight, np.float32)
    kept = len(begins)
    for turn, (start, end), (_, stop) in zip(document.turns, rendered.spans, document.contents, strict=True):
        inside = (ends > start) & (begins < end)
        last[inside] = np.minimum(last[inside], stop)  # a token that runs into what the template writes next
        after = int(np.searchsorted(begins, end))  # the mark that ends the turn
        if turn.learned:
            weights[inside] = 1.0
            weights[after : after + 1] = 1.0 if add_end else prompt_weight
            kept = after + add_end
    ids = np.array(tokens["input_ids"], np.int64)[:kept]
    return Encoded(
        ids,
        np.stack([first, last], 1).astype(np.int32)[:kept],
        weights[:kept],
        chat_template(tokenizer) or "",
    )


def prompt_ids(tokenizer: PreTrainedTokenizerBase, document: Document) -> list[int]:
    """Tokens of all that stands before the last completion, with the start mark, for a model to go on from."""
    if document.turns and chat_template(tokenizer):
        rendered = render(tokenizer, document)
        return list(
            tokenizer(
                rendered.text[: rendered.spans[-1][0]], add_special_tokens=False, verbose=False
            ).input_ids
        )
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return [start, *tokenizer(document.prompt, add_special_tokens=False, verbose=False).input_ids]
