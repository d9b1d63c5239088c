"""Open answers of a model: which questions are asked, and that answers do not depend on what stands beside them."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepfusion.errors import InputError
from deepfusion.learning.answers import answer_all, open_questions
from deepfusion.models.loading import load_model, load_tokenizer
from deepfusion.text.rows import Document


def test_only_open_questions_are_asked_and_always_the_same_ones() -> None:
    chosen = Document("Which?", " A. x", "d", (" A. x", " B. y"), 0)
    documents = [
        Document("", "Plain text.", "d"),
        chosen,
        *(Document(f"Why {n}?", " So.", "d") for n in range(20)),
    ]
    assert open_questions(documents) == documents[2:]
    few, more = open_questions(documents, 4), open_questions(documents, 9)
    assert len(few) == 4
    assert set(few) < set(more)
    with pytest.raises(InputError) as caught:
        open_questions(documents[:2])
    assert caught.value.code == "no-examples"


@pytest.mark.parametrize("kind", ["mini-gpt2", "mini-llama", "mini-bloom"])
def test_answers_do_not_depend_on_their_batch(zoo: dict[str, Path], kind: str) -> None:
    model, tokenizer = load_model(zoo[kind]), load_tokenizer(zoo[kind])
    texts = [
        "Why?",
        "The patient was given a low dose of aspirin before the operation. Why?",
        "The bank sold gold " * 40,
    ]
    questions = [Document(text, " So.", "d") for text in texts]
    together = answer_all(model, tokenizer, questions, max_tokens=16)
    assert together == [answer_all(model, tokenizer, [one], max_tokens=16)[0] for one in questions]
    assert [answer.question for answer in together] == [text.strip() for text in texts]
