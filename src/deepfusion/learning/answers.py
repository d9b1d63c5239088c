"""What a model answers to open questions, for a judge to score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from deepfusion import progress
from deepfusion.errors import InputError
from deepfusion.text.rows import Document
from deepfusion.text.sources import choose

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ANSWER_TOKENS = 256  # the longest answer of the model under test
CONTEXT_TOKENS = 2048  # for a model whose architecture sets no limit


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model answered to a question, and the reference to measure it against."""

    domain: str
    question: str
    reference: str
    answer: str


def open_questions(documents: Sequence[Document], limit: int | None = None) -> list[Document]:
    """The documents that ask for an open answer: a prompt, a completion, no options; at most `limit`, never other ones.

    Raises:
        InputError: there are none.
    """
    found = [document for document in documents if document.prompt.strip() and not document.options]
    if not found:
        what = "no document has a question and an open answer, so there is nothing to judge"
        raise InputError(what, allowed='{"prompt","completion"} or {"question","answer"}', code="no-examples")
    return choose(found, limit, 0, "judge")


def answer_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Document],
    *,
    batch_size: int = 16,
    max_tokens: int = ANSWER_TOKENS,
) -> list[Answer]:
    """Let a model answer, always with the likeliest token, in at most `max_tokens` tokens and half of its context.

    Of a prompt that is too long the end is kept.
    """
    import torch  # here, as scoring needs no model framework

    from deepfusion.models.loading import context_limit
    from deepfusion.text.encoding import prompt_ids

    limit = context_limit(model) or CONTEXT_TOKENS
    most = min(max_tokens, limit // 2)
    training, generate = model.training, cast("Any", model).generate
    model.eval()
    answers: list[Answer] = []
    for first in range(0, len(questions), batch_size):
        batch = questions[first : first + batch_size]
        asked = [prompt_ids(tokenizer, question) for question in batch]
        rows = [[found[0], *found[1:][-(limit - most - 1) :]] for found in asked]
        ids, mask = (torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long) for _ in range(2))
        for i, row in enumerate(rows):  # on the left, so that every prompt ends where its answer begins
            ids[i, -len(row) :] = torch.tensor(row)
            mask[i, -len(row) :] = 1
        with torch.inference_mode():
            output = generate(
                ids.to(model.device), attention_mask=mask.to(model.device), max_new_tokens=most,
                do_sample=False, num_beams=1,
                eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
        for question, text in zip(
            batch, tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True), strict=True
        ):
            answers.append(
                Answer(question.domain, question.prompt.strip(), question.completion.strip(), text.strip())
            )
        progress.say(f"[judge] {len(answers)}/{len(questions)} questions answered by the model")
    model.train(training)
    return answers
