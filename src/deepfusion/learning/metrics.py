"""How well a causal language model predicts held-out text: log-perplexity, bits per byte, accuracies, expert use."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deepfusion.errors import InputError
from deepfusion.families.base import router_logits_by_layer
from deepfusion.learning.choices import Verdict, judge_choices
from deepfusion.learning.scoring import Row, batches, padded, score
from deepfusion.models.loading import context_limit
from deepfusion.text.encoding import Encoded, encode
from deepfusion.text.rows import Document
from deepfusion.text.windows import cut_windows

# Of these a plain mean over the domains is taken; of the last three over those that have questions with options.
AVERAGED = ("log_perplexity", "bits_per_byte", "token_accuracy", "choice_accuracy", "acc", "acc_norm")
# Windows are not cut below this many characters, however short the context of the model.
LEAST_CHARS = 16


@dataclass(slots=True)
class _Window:
    """One window of a document; where it has options there is one row for each, and `answer` is the true one."""

    domain: str
    rows: list[Row]
    answer: int

    @property
    def truth(self) -> Row:
        return self.rows[self.answer]

    @property
    def chosen(self) -> int:
        """The option of the highest log-likelihood per UTF-8 byte, its leading space counted; ties: first."""
        return min(range(len(self.rows)), key=lambda i: self.rows[i].nats / max(self.rows[i].size, 1))


def evaluate_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    *,
    batch_size: int = 16,
    max_chars: int = 1024,
    choices: bool = True,
    lm_eval: bool = True,
) -> dict[str, Any]:
    """Measure a model on documents; every completion token counts once, prompts and end tokens never do.

    Args:
        model: any causal language model, in any dtype, on any device; it is left as it was.
        tokenizer: its fast tokenizer.
        documents: documents; long ones are cut into windows, and none of their completions is left out.
        batch_size: windows (or options) per forward pass; fewer where their logits would not fit.
        max_chars: characters per window.
        choices: also score every option of multiple-choice documents.
        lm_eval: where `choices`, once more as lm-evaluation-harness does, which has other marks.

    Returns:
        `log_perplexity` (nats per counted token), `perplexity`, `bits_per_byte` (of the completions, so that models
        with different tokenizers compare), `token_accuracy` (share of tokens predicted exactly), `choice_accuracy`
        (the option of the highest likelihood per byte of the completion, its leading space counted, after our start
        mark), `acc` and `acc_norm` (those of lm-evaluation-harness, see `choices`; all three None where not asked for),
        `tokens`, `examples`: over all tokens. The same keys per domain in `by_domain`. The headline is
        `mean_over_domains`, the plain means of the domains, whatever their numbers of tokens.

    Raises:
        InputError: no documents, no token to count, a number out of its bounds, or a model whose losses are not finite.
    """
    _check(documents, batch_size, max_chars)
    scored: list[_Window] = []
    for document in documents:
        scored.extend(_windows(tokenizer, document, max_chars, context_limit(model), choices))
    score(model, [window.rows for window in scored], batch_size)
    asked = [e for e in documents if choices and lm_eval and e.options and e.answer is not None]
    verdicts = judge_choices(model, tokenizer, asked, batch_size=batch_size)
    domains = [document.domain for document in documents]
    by_domain = {
        domain: _summary(
            [window for window in scored if window.domain == domain],
            [verdict for document, verdict in zip(asked, verdicts, strict=True) if document.domain == domain],
            domains.count(domain),
        )
        for domain in sorted(set(domains))
    }
    means = {key: _mean([values[key] for values in by_domain.values()]) for key in AVERAGED}
    return {**_summary(scored, verdicts, len(documents)), "mean_over_domains": means, "by_domain": by_domain}


def _check(documents: Sequence[Document], batch_size: int, max_chars: int = LEAST_CHARS) -> None:
    """Refuse what could not end, or would end in a division by zero."""
    if not documents:
        raise InputError("there is no document to evaluate on", code="no-examples")
    for name, value, least in (("batch_size", batch_size, 1), ("max_chars", max_chars, LEAST_CHARS)):
        if not isinstance(value, int) or value < least:
            raise InputError(
                f"{name} is {value!r}", allowed=f"a whole number of at least {least}", code="bad-value"
            )


def _mean(values: Sequence[float | None]) -> float | None:
    """Plain mean of those that are there; None where none is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def bits_per_byte_of_each(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    *,
    batch_size: int = 16,
) -> list[float]:
    """Bits per UTF-8 byte of each completion by itself, in the order of `documents`."""
    if documents:
        _check(documents, batch_size)
    limit = context_limit(model)
    rows = [[row for w in _windows(tokenizer, e, 1 << 30, limit, False) for row in w.rows] for e in documents]
    score(model, [[row] for own in rows for row in own], batch_size)
    return [sum(r.nats for r in own) / math.log(2) / max(sum(r.size for r in own), 1) for own in rows]


def expert_use(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    *,
    batch_size: int = 16,
    max_chars: int = 1024,
) -> dict[str, list[list[float]]]:
    """How the router of a Mixture-of-Experts shares out the tokens of each domain [DF eq. 4].

    Returns:
        domain -> one list per MoE layer -> share of each expert in the top-k choices of all tokens; a list sums to 1.
        Limits that a family puts on groups of experts are not counted in.

    Raises:
        InputError: no examples, a number out of its bounds, or a model without routers.
    """
    _check(documents, batch_size, max_chars)
    rows: dict[str, list[Row]] = {}
    for document in documents:
        for window in _windows(tokenizer, document, max_chars, context_limit(model), choices=False):
            rows.setdefault(window.domain, []).extend(window.rows)
    return {domain: _expert_shares(model, rows[domain], batch_size) for domain in sorted(rows)}


def _windows(
    tokenizer: PreTrainedTokenizerBase, document: Document, max_chars: int, limit: int | None, choices: bool
) -> Iterator[_Window]:
    for window in cut_windows(document, max_chars):
        options = window.options if choices and window.answer is not None else ()
        completions = options or (window.completion,)
        answer = window.answer if options and window.answer is not None else 0
        encoded = [encode(tokenizer, replace(window, completion=text), add_end=False) for text in completions]
        if limit and max_chars > LEAST_CHARS and max(len(one.input_ids) for one in encoded) > limit:
            # Cutting the text again, rather than the tokens, keeps the measured text the same for every model.
            yield from _windows(tokenizer, window, min(max_chars, len(window.text)) // 2, limit, choices)
        else:
            sizes = [len(text.encode()) for text in options] or [window.learned_bytes]
            rows = [_row(one, size, limit) for one, size in zip(encoded, sizes, strict=True)]
            yield _Window(window.domain, rows, answer)


def _row(encoded: Encoded, size: int, limit: int | None) -> Row:
    counted = encoded.weights > 0
    counted[:1] = False  # Nothing stands before the first token that could predict it.
    return Row(encoded.input_ids[:limit], counted[:limit], size)


@torch.inference_mode()
def _expert_shares(model: PreTrainedModel, rows: Sequence[Row], batch_size: int) -> list[list[float]]:
    top_k = getattr(model.config, "num_experts_per_tok", None)
    counts: list[torch.Tensor] = []
    training = model.training
    model.eval()
    for batch in batches(rows, batch_size, model.config.get_text_config().vocab_size):
        ids, mask = padded([row.input_ids for row in batch], model.device)
        with router_logits_by_layer(model) as layers:
            # The body alone: routers need no logits over the vocabulary.
            model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        if not layers or not top_k:
            raise InputError("the model has no routers", where=type(model).__name__, code="no-routers")
        real = mask.flatten().bool()
        found = [_choices(layers[layer][real], top_k) for layer in sorted(layers)]
        counts = [a + b for a, b in zip(counts, found, strict=True)] if counts else found
    model.train(training)
    return [(count / count.sum()).tolist() for count in counts]


def _choices(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """How often each expert is among the top k: float [tokens, experts] -> int64 [experts]."""
    return torch.bincount(logits.topk(top_k, dim=-1).indices.flatten(), minlength=logits.shape[-1])


def _summary(scored: Sequence[_Window], verdicts: Sequence[Verdict], documents: int) -> dict[str, Any]:
    truths = [window.truth for window in scored]
    tokens, nats = sum(row.tokens for row in truths), sum(row.nats for row in truths)
    if not tokens:
        raise InputError("the documents hold no token to count", code="no-tokens")
    if not math.isfinite(nats):
        raise InputError(
            "the losses of the model are not finite; its weights are broken", code="non-finite-loss"
        )
    questions = [window for window in scored if len(window.rows) > 1]
    right = sum(window.chosen == window.answer for window in questions)
    return {
        "log_perplexity": nats / tokens,
        "perplexity": math.exp(min(nats / tokens, 700.0)),  # e^710 is beyond a float
        "bits_per_byte": nats / math.log(2) / sum(row.size for row in truths),
        "token_accuracy": sum(row.correct for row in truths) / tokens,
        "choice_accuracy": right / len(questions) if questions else None,
        "acc": _mean([verdict.acc for verdict in verdicts]),
        "acc_norm": _mean([verdict.acc_norm for verdict in verdicts]),
        "tokens": tokens,
        "examples": documents,
    }
