"""Conversations in the words of the model that reads them: what its own chat template writes around the contents of
the turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from deepfusion.errors import InputError
from deepfusion.text.rows import Document

# Some templates write today's date; a training that goes on tomorrow must read the same.
_TODAY = "01 Jan 2026"


class Rendered(NamedTuple):
    """A conversation as one model reads it.

    Attributes:
        text: with all that the template writes, up to what it writes after the last content.
        spans: `[start, end)` in characters of `text` of the content of every turn.
    """

    text: str
    spans: list[tuple[int, int]]


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The template of a tokenizer; None for a model that was never taught to chat.

    Raises:
        InputError: it has several, and none of them is the default.
    """
    if not tokenizer.chat_template:
        return None
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        where = tokenizer.name_or_path
        raise InputError(
            f"no default among its chat templates ({error})"[:300], where=where, code="chat-template"
        ) from None


def render(tokenizer: PreTrainedTokenizerBase, document: Document) -> Rendered:
    """Write a conversation with the tokenizer's own chat template; contents stand in it word for word.

    Raises:
        InputError: the template cannot write these turns in this order.
    """
    turns, template = document.turns, chat_template(tokenizer)
    assert template is not None
    special = tuple(sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items()))
    markup = _markup(_Template(tokenizer, template, special), tuple(turn.role for turn in turns))
    text, spans = "", []
    for before, turn in zip(markup, turns, strict=False):
        start = len(text) + len(before)
        spans.append((start, start + len(turn.content)))
        text += before + turn.content
    return Rendered(text + markup[-1], spans)


def places(document: Document, rendered: Rendered) -> tuple[np.ndarray, np.ndarray]:
    """Where each character of a rendered conversation stands in `document.text`: int64 starts and ends, one each a
    character.

    Contents keep their characters. What the template writes before a content has no width and stands where, in
    plain words, the label of the turn ends; what it writes after the last one stands at the end.
    """
    starts = np.full(len(rendered.text), len(document.text), np.int64)
    ends = starts.copy()
    done = 0
    for (begin, end), (start, _) in zip(rendered.spans, document.contents, strict=True):
        starts[done:begin] = ends[done:begin] = start - 1
        starts[begin:end] = np.arange(start, start + end - begin)
        ends[begin:end] = starts[begin:end] + 1
        done = end
    return starts, ends


class _Template:
    """A tokenizer that counts as equal to another with the same template and special tokens."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: str, special: tuple[tuple[str, str], ...]
    ) -> None:
        self.tokenizer, self.key = tokenizer, (template, special)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Template) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


@lru_cache(maxsize=4096)
def _markup(template: _Template, roles: tuple[str, ...]) -> list[str]:
    """What the template writes before, between and after the contents of such turns: one text more than turns.

    Found with words that no template holds in place of the contents, so that a content can say anything.
    """
    words = [f"qZ{number}Content{len(roles)}Xq" for number in range(len(roles))]
    messages = [{"role": role, "content": word} for role, word in zip(roles, words, strict=True)]
    try:
        text = _apply(template.tokenizer, messages)
    except Exception as error:  # Templates come from others, and fail in many ways.
        if roles[0] != "system" or len(roles) < 2:
            raise _refused(template, roles, str(error)) from None
        # Templates that know no system turn want its text before the first turn of the user.
        first = {"role": roles[1], "content": f"{words[0]}\n\n{words[1]}"}
        try:
            text = _apply(template.tokenizer, [first, *messages[2:]])
        except Exception:
            raise _refused(template, roles, str(error)) from None
    found = [text.find(word) for word in words]
    if -1 in found or found != sorted(found) or any(text.count(word) > 1 for word in words):
        raise _refused(template, roles, "it leaves turns out, repeats or reorders them")
    ends = [0, *(place + len(word) for place, word in zip(found, words, strict=True))]
    return [text[end:place] for end, place in zip(ends, [*found, len(text)], strict=True)]


def _apply(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]) -> str:
    template = chat_template(tokenizer) or ""
    if "strftime_now" in template:
        template = f"{{%- macro strftime_now(format) -%}}{_TODAY}{{%- endmacro %}}{template}"
    return str(
        tokenizer.apply_chat_template(
            list(messages), chat_template=template, tokenize=False, date_string=_TODAY
        )
    )


def _refused(template: _Template, roles: tuple[str, ...], why: str) -> InputError:
    turns = ", ".join(roles[:8]) + (", ..." if len(roles) > 8 else "")
    return InputError(
        f"the chat template of the model cannot write the turns {turns} ({' '.join(why.split())[:200]})",
        where=template.tokenizer.name_or_path or None, fix="change the conversation, or a model with another template",
        code="chat-template",
    )  # fmt: skip
