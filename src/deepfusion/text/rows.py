"""A document, and how one row of a data file becomes one: texts, prompts, questions, instructions, conversations."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from deepfusion.errors import InputError

FORMATS = '{"text"}, {"prompt","completion"}, {"question","options","answer"} or {"messages"}'
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

Row = Mapping[str, Any]


class Turn(NamedTuple):
    """One message of a conversation; `learned` where it is the assistant's and models shall learn to say it."""

    role: str
    content: str
    learned: bool = False

    @property
    def label(self) -> str:
        """What stands before the content where no chat template says it."""
        return f"{self.role.capitalize()}:"


@dataclass(frozen=True, slots=True)
class Document:
    """One document: what is given (prompt) and what a model learns to say (completion).

    `options` holds the completion of every choice of a multiple-choice question and `answer` the index of the right
    one, so that `options[answer] == completion`; other documents have neither.

    `turns` are those of a conversation, which ends with a learned turn; prompt and completion are then the
    conversation in plain words, as a model without a chat template reads it (`conversation`).
    """

    prompt: str
    completion: str
    domain: str
    options: tuple[str, ...] = ()
    answer: int | None = None
    turns: tuple[Turn, ...] = ()

    @property
    def text(self) -> str:
        """The whole document."""
        return self.prompt + self.completion

    @property
    def id(self) -> str:
        """SHA-256 (hex) of the text without regard to case and whitespace: what makes it the same text for a test."""
        return hashlib.sha256(" ".join(self.text.casefold().split()).encode()).hexdigest()

    @property
    def contents(self) -> list[tuple[int, int]]:
        """`[start, end)` in characters of `text` of the content of every turn."""
        spans, place = [], 0
        for turn in self.turns:
            start = place + len(turn.label) + 1
            spans.append((start, place := start + len(turn.content)))
            place += 1
        return spans

    @property
    def learned(self) -> list[tuple[int, int]]:
        """`[start, end)` in characters of `text` of all that a model learns to say, with the space before it."""
        if not self.turns:
            return [(len(self.prompt), len(self.prompt) + len(self.completion))]
        spans = zip(self.turns, self.contents, strict=True)
        return [(start - 1, end) for turn, (start, end) in spans if turn.learned]

    @property
    def learned_bytes(self) -> int:
        """UTF-8 bytes of `learned`, which do not depend on the tokenizer or the chat template of a model."""
        text = self.text
        return sum(len(text[start:end].encode()) for start, end in self.learned)


def conversation(turns: list[Turn], domain: str) -> Document:
    """A conversation as a document; what comes after its last learned turn is left out, for there is nothing to learn
    in it.
    """
    last = max(index for index, turn in enumerate(turns) if turn.learned)
    before = "".join(f"{turn.label} {turn.content}\n" for turn in turns[:last])
    return Document(
        f"{before}{turns[last].label}", f" {turns[last].content}", domain, turns=tuple(turns[: last + 1])
    )


def to_row(document: Document) -> dict[str, Any]:
    """The row of a data file that `parse_row` and `from_row` turn into the same example."""
    if document.turns:
        messages = [
            {"role": turn.role, "content": turn.content}
            | ({} if turn.learned or turn.role != "assistant" else {"weight": 0})
            for turn in document.turns
        ]
        return {"messages": messages, "domain": document.domain}
    row: dict[str, Any] = {
        "prompt": document.prompt,
        "completion": document.completion,
        "domain": document.domain,
    }
    return row | ({"options": document.options, "answer": document.answer} if document.options else {})


def from_row(row: Row) -> Document:
    """What `to_row` made a row of, also where a window holds nothing but white space."""
    if "messages" in row:
        learned = [turn["role"] == "assistant" and turn.get("weight") != 0 for turn in row["messages"]]
        turns = [
            Turn(turn["role"], turn["content"], learn)
            for turn, learn in zip(row["messages"], learned, strict=True)
        ]
        return conversation(turns, row["domain"])
    return Document(
        row["prompt"], row["completion"], row["domain"], tuple(row.get("options", ())), row.get("answer")
    )


def parse_row(values: object, domain: str) -> Document:
    """One data row as an example; `domain` is used where the row names none.

    Besides the four documented formats this reads questions without options, the columns of MMedBench
    (`answer_idx` beside `answer`), instruction data (`instruction`, `input`, `output`: Alpaca, FinGPT's FiQA-QA),
    `conversations` of ShareGPT, and prompt and completion as lists of messages.

    Raises:
        InputError: not an object, no known keys, wrong types, empty text, no answer.
    """
    if not isinstance(values, Mapping):
        raise InputError("a row must be a JSON object", allowed=FORMATS, code="bad-row")
    row = {key: value for key, value in values.items() if value is not None}
    domain = _string(row, "domain") if "domain" in row else domain
    document = _reader(row)(row, domain)
    if any(
        0xD800 <= ord(character) <= 0xDFFF
        for character in f"{document.text}{domain}{''.join(document.options)}"
    ):
        raise InputError("half of a surrogate pair is not text", code="bad-text")
    return document


def unread_keys(values: Row) -> set[str]:
    """Keys of a row that `parse_row` has read whose texts, lists and objects it makes nothing of."""
    row = {key: value for key, value in values.items() if value is not None}
    reader = _reader(row)
    read = {"domain", *_READS[reader]}
    if reader is _question_row and "options" not in row:
        read |= set(LETTERS) if "choices" not in row else {"choices"}
    found = {
        str(key)
        for key, value in row.items()
        if key not in read and isinstance(value, str | list | Mapping) and value
    }
    if reader is _messages_row:
        for key in ("messages", "conversations", "prompt", "completion"):
            for message in row[key] if isinstance(row.get(key), list) else ():
                found |= {
                    f"{key}.{inner}" for inner, value in message.items() if inner not in _MESSAGE and value
                }
    return found


def _reader(row: Row) -> Callable[[Row, str], Document]:
    if "messages" in row or "conversations" in row or isinstance(row.get("completion"), list):
        return _messages_row
    for key, reader in (
        ("completion", _prompt_row),
        ("question", _question_row),
        ("instruction", _instruction_row),
    ):
        if key in row:
            return reader
    if "text" in row:
        return _text_row
    raise InputError(f"no known keys in {sorted(map(str, row))[:8]}", allowed=FORMATS, code="unknown-format")


def _text_row(row: Row, domain: str) -> Document:
    return Document("", _string(row, "text"), domain)


def _string(row: Row, key: str, empty: bool = False) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        got = "is missing" if value is None else f"must be text, got {type(value).__name__}"
        raise InputError(f'"{key}" {got}', allowed=FORMATS, code="wrong-type")
    if not empty and not value.strip():
        raise InputError(f'"{key}" is empty', code="empty-text")
    return value


def _prompt_row(row: Row, domain: str) -> Document:
    prompt, completion = _string(row, "prompt", empty=True), _string(row, "completion")
    options, answer = row.get("options", []), row.get("answer")
    if not options:
        return Document(prompt, completion, domain)
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise InputError('"options" beside a completion must be a list of texts', code="wrong-type")
    if type(answer) is not int or not 0 <= answer < len(options) or options[answer] != completion:
        raise InputError('"answer" must be the index of the completion in "options"', code="bad-answer")
    return Document(prompt, completion, domain, tuple(options), answer)


def _question_row(row: Row, domain: str) -> Document:
    question = f"Question: {_string(row, 'question').strip()}\n"
    answer = row.get("answer_idx", row.get("answer", row.get("answerKey")))
    if answer is None:
        raise InputError('the question has no "answer"', allowed=FORMATS, code="no-answer")
    options = row.get("options", row.get("choices"))
    if options is None and "A" in row and "B" in row:  # a column for each option
        options = {letter: row[letter] for letter in LETTERS if letter in row}
    if isinstance(options, Mapping) and set(options) == {"text", "label"}:  # as in ARC
        if not all(isinstance(part, list) for part in options.values()) or len(options["text"]) != len(
            options["label"]
        ):
            raise InputError(
                '"text" and "label" of the choices must be lists of one length', code="bad-options"
            )
        options = dict(zip(map(str, options["label"]), options["text"], strict=True))
    if options is None:
        if not isinstance(answer, str) or not answer.strip():
            raise InputError('"answer" must be text where there are no options', code="bad-answer")
        return Document(f"{question}Answer:", f" {answer.strip()}", domain)
    if isinstance(
        options, Mapping
    ):  # Keys need not be A, B, C, so an answer that is a key is looked up as one.
        keys = [key for key in sorted(options) if options[key] is not None]
        answer = keys.index(answer) if isinstance(answer, str) and answer in keys else answer
        options = [options[key] for key in keys]
    choices = [f"{letter}. {text}" for letter, text in zip(LETTERS, _option_texts(options), strict=False)]
    right = _right_choices(answer, choices)
    prompt = question + "\n".join(choices) + "\nAnswer:"
    if len(right) > 1:  # Several right answers, as in parts of MMedBench: no single choice to measure.
        return Document(prompt, " " + "\n".join(choices[index] for index in right), domain)
    options = tuple(f" {choice}" for choice in choices)
    return Document(prompt, options[right[0]], domain, options, right[0])


def _option_texts(options: object) -> list[str]:
    """Options given as a list or as one text "A. x\\nB. y", without their letters."""
    options = _split_options(options) if isinstance(options, str) else options
    if not isinstance(options, list) or not all(
        isinstance(option, str) and option.strip() for option in options
    ):
        raise InputError(
            '"options" must be a list, a {letter: text} object or lines "A. text"', code="bad-options"
        )
    if not 2 <= len(options) <= len(LETTERS):
        raise InputError(f"{len(options)} options", allowed=f"2 to {len(LETTERS)}", code="bad-options")
    texts = [" ".join(option.split()) for option in options]
    lettered = [re.match(rf"{letter}[.)] (?=.)", text) for letter, text in zip(LETTERS, texts, strict=False)]
    if all(lettered):
        texts = [text[match.end() :] for text, match in zip(texts, lettered, strict=True) if match]
    return texts


def _split_options(text: str) -> list[str]:
    options: list[str] = []
    for line in text.strip().split("\n"):
        if len(options) < len(LETTERS) and re.match(rf"\s*{LETTERS[len(options)]}[.)]\s", line):
            options.append(line.strip())
        elif options:
            options[-1] += " " + line
    return options


def _right_choices(answer: object, choices: list[str]) -> list[int]:
    """Indexes of the right choices; a lone letter is read as a letter even where an option is that same letter."""
    if type(answer) is int and 0 <= answer < len(choices):
        return [answer]
    if isinstance(answer, str):
        wanted = " ".join(answer.split()).casefold()
        letters = re.fullmatch(r"\(?([a-z])[.)]?|([a-z](?:, ?[a-z])+)", wanted)
        if letters:
            indexes = [LETTERS.index(letter.upper()) for letter in sorted(set(re.findall("[a-z]", wanted)))]
            if max(indexes) < len(choices):
                return indexes
        for index, choice in enumerate(choices):
            if wanted in (choice.casefold(), choice[3:].casefold()):
                return [index]
        if re.fullmatch("[0-9]{1,2}", wanted) and int(wanted) < len(choices):  # an index, as tables write it
            return [int(wanted)]
    what = f'"answer" {str(answer)[:60]!r} is none of the options'
    raise InputError(what, allowed="a letter, an index or an option", code="bad-answer")


# Who speaks, as the messages of chat APIs and as ShareGPT name it.
_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bard", "bing", "bot", "model"), "assistant"),
}


def _messages_row(row: Row, domain: str) -> Document:
    """`messages`, `conversations` of ShareGPT, or prompt and completion as lists of messages."""
    for key in ("tools", "functions"):
        if row.get(key):
            raise InputError(
                f'"{key}" beside a conversation is not read',
                allowed="turns of text",
                code="unsupported-message",
            )
    if "completion" in row:
        turns = [turn._replace(learned=False) for turn in _turns(row, "prompt")] + _turns(row, "completion")
    else:
        turns = _turns(row, "messages" if "messages" in row else "conversations")
    if not any(turn.learned for turn in turns):
        raise InputError("the conversation holds no turn of the assistant to learn from", code="no-answer")
    return conversation(turns, domain)


def _turns(row: Row, key: str) -> list[Turn]:
    messages = row.get(key)
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise InputError(f'"{key}" must be a list of {{"role", "content"}}', code="wrong-type")
    return [_turn(message, f'"{key}"[{number}]') for number, message in enumerate(messages)]


def _turn(message: Row, where: str) -> Turn:
    """One message; what a chat template would render and we do not read is refused rather than lost."""
    name, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    role = _ROLES.get(name.strip().casefold()) if isinstance(name, str) else None
    if role is None:
        allowed = "system, user or assistant"
        raise InputError(
            f"{where} is a turn of {str(name)[:40]!r}", allowed=allowed, code="unsupported-message"
        )
    for key in ("tool_calls", "function_call"):
        if message.get(key):
            raise InputError(f'{where} holds "{key}"', allowed="turns of text", code="unsupported-message")
    if isinstance(content, list):
        parts = [
            part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else part
            for part in content
        ]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) < len(parts):
            raise InputError(
                f"{where} holds parts that are no text", allowed="text parts", code="unsupported-message"
            )
        content = "".join(texts)
    if not isinstance(content, str):
        got = "has no content" if content is None else f"must hold text, got {type(content).__name__}"
        raise InputError(f"{where} {got}", allowed="text, or a list of text parts", code="wrong-type")
    if not content.strip():
        raise InputError(f"{where} is empty", code="empty-text")
    return Turn(role, content, role == "assistant" and message.get("weight") != 0)


def _instruction_row(row: Row, domain: str) -> Document:
    """FinGPT's own template for its instruction data."""
    given = _string(row, "input", empty=True).strip() if "input" in row else ""
    prompt = f"Instruction: {_string(row, 'instruction').strip()}\n" + (f"Input: {given}\n" if given else "")
    return Document(f"{prompt}Answer:", f" {_string(row, 'output').strip()}", domain)


# What each form reads of a row, besides its domain.
_MESSAGE = {"role", "from", "content", "value", "weight", "tool_calls", "function_call"}
_READS: dict[Callable[[Row, str], Document], set[str]] = {
    _messages_row: {"messages", "conversations", "prompt", "completion", "tools", "functions"},
    _prompt_row: {"prompt", "completion", "options", "answer"},
    _question_row: {"question", "options", "answer", "answer_idx", "answerKey"},
    _instruction_row: {"instruction", "input", "output"},
    _text_row: {"text"},
}
