"""Conversations as each model's own chat template writes them: what is learned, what is measured, what two templates
share.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from deepfusion.errors import InputError
from deepfusion.learning.align import align_offsets, shared_vocabulary
from deepfusion.learning.corpus import Window, read_corpus, write_corpus
from deepfusion.text.chat import render
from deepfusion.text.encoding import encode, prompt_ids
from deepfusion.text.rows import Document, Turn, conversation, parse_row
from deepfusion.text.windows import cut_windows

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As of Llama 2 and Gemma: marks with words, contents trimmed, a start mark, today's date, no turn of the system.
STRICT = (
    "{{ bos_token }}{{ strftime_now('%d %b %Y') }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}[INST] {{ m['content'] | trim }} [/INST]"
    "{% else %} {{ m['content'] | trim }} {{ eos_token }}{% endif %}"
    "{% endfor %}"
)
MARKS = ["<|end|>", "<s>", "<|im_start|>", "<|im_end|>"]


def byte_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """One token a byte, and the marks."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*MARKS, *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|end|>")
    made.add_special_tokens({"additional_special_tokens": MARKS[2:]})
    made.chat_template = template
    return made


PLAIN, CHAT, OTHER = byte_tokenizer(None), byte_tokenizer(CHATML), byte_tokenizer(STRICT)

CONTENT = st.text(st.sampled_from("ab é\nUserAssistant:<|>{%}中"), min_size=1, max_size=30).filter(str.strip)
TURNS = st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=5)


def chat(pairs: list[tuple[str, str]], system: str | None = None) -> Document:
    turns = [Turn("system", system)] if system else []
    for asked, answered in pairs:
        turns += [Turn("user", asked), Turn("assistant", answered, True)]
    return conversation(turns, "d")


def learned_text(tokenizer: PreTrainedTokenizerFast, document: Document) -> str:
    encoded = encode(tokenizer, document, add_end=False)
    return tokenizer.decode(encoded.input_ids[encoded.weights > 0], clean_up_tokenization_spaces=False)


@settings(deadline=None)
@given(TURNS, st.none() | CONTENT)
def test_tokens_are_those_of_the_template_and_all_answers_are_learned(
    pairs: list[tuple[str, str]], system: str | None
) -> None:
    document = chat(pairs, system)
    messages = [{"role": turn.role, "content": turn.content} for turn in document.turns]
    whole = CHAT.apply_chat_template(messages, tokenize=True, return_dict=False)
    encoded = encode(CHAT, document)
    assert encoded.input_ids.tolist() == whole[: len(encoded.input_ids)]
    assert (
        CHAT.decode(whole[len(encoded.input_ids) :]) == "\n"
    )  # what follows the last mark is for nobody to learn
    answers = [turn.content for turn in document.turns if turn.learned]
    assert learned_text(CHAT, document) == "".join(answers)
    assert CHAT.decode(encoded.input_ids[encoded.weights > 0]) == "".join(
        f"{answer}<|im_end|>" for answer in answers
    )
    assert learned_text(PLAIN, document) == "".join(f" {answer}" for answer in answers)
    assert prompt_ids(CHAT, document) == encoded.input_ids[: len(prompt_ids(CHAT, document))].tolist()
    assert CHAT.decode(prompt_ids(CHAT, document)).endswith("<|im_start|>assistant\n")


@settings(deadline=None)
@given(TURNS, st.none() | CONTENT)
def test_offsets_are_characters_of_the_plain_text(pairs: list[tuple[str, str]], system: str | None) -> None:
    document = chat(pairs, system)
    for tokenizer in (CHAT, OTHER, PLAIN):
        encoded = encode(tokenizer, document)
        starts, ends = encoded.offsets.T
        assert (starts <= ends).all()
        assert (np.diff(starts) >= 0).all()
        for (start, end), turn in zip(document.contents, document.turns, strict=True):
            inside = (ends > starts) & (starts >= start) & (ends <= end)
            assert set(range(start, end)) == {
                place for a, b in encoded.offsets[inside] for place in range(a, b)
            }
            assert document.text[start:end] == turn.content
        assert starts[-1] == ends[-1] == len(document.text)


@settings(deadline=None)
@given(TURNS)
def test_two_templates_meet_at_every_character_of_the_contents(pairs: list[tuple[str, str]]) -> None:
    document = chat(pairs)
    starts = [start - 1 for start, _ in document.contents]
    for student, teacher in ((PLAIN, CHAT), (CHAT, OTHER), (OTHER, PLAIN)):
        own, theirs = encode(student, document), encode(teacher, document)
        found = align_offsets(own.offsets, theirs.offsets, starts)
        met = own.offsets[found.student_index, 1]
        assert (met == theirs.offsets[found.teacher_index, 1]).all()
        single = found.student_index[:-1][found.single]
        ahead = own.offsets[single + 1]  # the next tokens whose distributions are compared
        compared = set(ahead[ahead[:, 1] > ahead[:, 0], 1].tolist())
        for (start, end), turn in zip(document.contents, document.turns, strict=True):
            if turn.content.isascii():
                assert set(range(start + 2, end + 1)) <= compared
            assert (
                start + 1 not in compared
            )  # the first of a turn: one template writes a space there, another none


def test_equal_templates_are_one_and_the_same_reading() -> None:
    document = chat([("Hi", "Hello")])
    assert (
        encode(CHAT, document).template
        == encode(copy.deepcopy(CHAT), document).template
        != encode(OTHER, document).template
    )
    assert encode(PLAIN, document).template == ""
    assert shared_vocabulary(CHAT, OTHER).identical


def test_a_system_turn_goes_into_the_first_question_where_a_template_knows_none() -> None:
    text = render(OTHER, chat([("Hi", "Hello")], "Be kind.")).text
    assert "[INST] Be kind.\n\nHi [/INST] Hello" in text
    assert "01 Jan 2026" in text  # the same tomorrow


def test_what_a_template_cannot_write_is_refused_in_one_line() -> None:
    twice = conversation([Turn("user", "a"), Turn("user", "b"), Turn("assistant", "c", True)], "d")
    with pytest.raises(
        InputError, match=r"cannot write the turns user, user, assistant \(.*alternate"
    ) as error:
        encode(OTHER, twice)
    assert "\n" not in str(error.value)
    forgetful = byte_tokenizer("{% for m in messages[-1:] %}{{ m['content'] }}{% endfor %}")
    with pytest.raises(InputError, match="leaves turns out"):
        encode(forgetful, chat([("Hi", "Hello")]))
    named = byte_tokenizer(None)
    named.chat_template = {"tools": CHATML}
    with pytest.raises(InputError, match="no default among its chat templates"):
        encode(named, chat([("Hi", "Hello")]))


def test_turns_of_weight_0_are_read_and_not_learned() -> None:
    said = [("user", "a"), ("assistant", "no"), ("user", "b"), ("assistant", "yes")]
    row: dict[str, Any] = {"messages": [{"role": role, "content": content} for role, content in said]}
    row["messages"][1]["weight"] = 0
    document = parse_row(row, "d")
    assert learned_text(CHAT, document) == "yes"
    assert learned_text(PLAIN, document) == " yes"


@settings(deadline=None)
@given(TURNS, st.integers(24, 120), st.none() | CONTENT)
def test_windows_hold_every_answer_once(
    pairs: list[tuple[str, str]], max_chars: int, system: str | None
) -> None:
    cut = cut_windows(chat(pairs, system), max_chars)
    learned = "".join(
        "".join(turn.content for turn in window.turns if turn.learned) if window.turns else window.text
        for window in cut
    )
    assert learned == "".join(answer for _, answer in pairs)
    assert all(0 < len(window.text) <= max_chars for window in cut)
    for window in cut:
        encode(CHAT, window)


def test_the_corpus_keeps_conversations(tmp_path: Path) -> None:
    documents = [
        Window(window, "public", 1)
        for window in cut_windows(chat([("Hi", "Hello " * 9), ("And", "So")], "Be kind."), 40)
    ] + [Window(Document("p", " ", "d"), "sampled", 0)]
    write_corpus(documents, tmp_path / "corpus.jsonl")
    assert read_corpus(tmp_path / "corpus.jsonl") == documents
