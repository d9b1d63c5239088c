"""Texts longer than a window are cut; what is left of a prompt or a conversation is still one."""

from __future__ import annotations

import re
from collections.abc import Sequence

from deepfusion import progress
from deepfusion.errors import InputError
from deepfusion.text.rows import Document, Turn, conversation


def cut_windows(document: Document, max_chars: int) -> list[Document]:
    """Cut a text that is longer than `max_chars` characters at whitespace (inside a word where there is none).

    A short completion keeps the end of its prompt in one window. A completion of more than half a window is cut into
    consecutive windows, the first with the end of the prompt in at most half of it, the others without a prompt. The
    completions of the windows make up the whole completion. Options survive where there is one window. A
    conversation is cut between its exchanges.

    Raises:
        InputError: windows of less than two characters.
    """
    if max_chars < 2:
        raise InputError(f"max_chars={max_chars}", allowed="2 or more", code="bad-value")
    if len(document.text) <= max_chars:
        return [document]
    if document.turns:
        return _chat_windows(document, max_chars)
    prompt, completion, domain = document.prompt, document.completion, document.domain
    if len(completion) <= max_chars // 2:
        prompt = _prompt_end(prompt, max_chars - len(completion))
        return [Document(prompt, completion, domain, document.options, document.answer)]
    prompt = _prompt_end(prompt, max_chars // 2)
    pieces = _cut_text(completion, max_chars - len(prompt), max_chars)
    if len(pieces) == 1:
        return [Document(prompt, completion, domain, document.options, document.answer)]
    return [Document(prompt, pieces[0], domain), *(Document("", piece, domain) for piece in pieces[1:])]


def _cut_text(text: str, first: int, room: int) -> list[str]:
    """Pieces of at most `room` characters, the first of at most `first`, each but the first from a white space if
    there is one.
    """
    pieces, start, size = [], 0, first
    while len(text) - start > size:
        end = next((index for index in range(start + size, start, -1) if text[index].isspace()), start + size)
        pieces.append(text[start:end])
        start, size = end, room
    return [*pieces, text[start:]]


def _chat_windows(document: Document, max_chars: int) -> list[Document]:
    """As many exchanges as fit in each window: an exchange ends with a learned turn, and every learned turn is in one
    window.

    Of an exchange that does not fit, the end of what was said last before it and the beginning of the learned turn
    make one window, and the rest of that turn plain texts.
    """
    cut: list[Document] = []
    kept: list[Turn] = []
    exchange: list[Turn] = []
    for turn in document.turns:
        exchange.append(turn)
        if not turn.learned:
            continue
        if kept and len(conversation(kept + exchange, document.domain).text) > max_chars:
            cut.append(conversation(kept, document.domain))
            kept = []
        kept += exchange
        if len(conversation(kept, document.domain).text) > max_chars:
            cut += _long_exchange(exchange, document.domain, max_chars)
            kept = []
        exchange = []
    return [*cut, conversation(kept, document.domain)] if kept else cut


def _long_exchange(exchange: list[Turn], domain: str, max_chars: int) -> list[Document]:
    *before, answer = exchange
    labels = len(answer.label) + 1 + sum(len(turn.label) + 2 for turn in before[-1:])
    room = max(max_chars - labels, 2)
    asked = [
        turn._replace(content=_prompt_end(turn.content, max(room - len(answer.content), room // 2)))
        for turn in before[-1:]
    ]
    pieces = _cut_text(answer.content, room - sum(len(turn.content) for turn in asked), max_chars)
    first = conversation([*asked, answer._replace(content=pieces[0])], domain)
    return [first, *(Document("", piece, domain) for piece in pieces[1:])]


def say_cut(documents: Sequence[Document], max_chars: int) -> None:
    """Tell how many documents do not fit in a window with all that stands before what is learned."""
    cut = sum(
        len(e.text) > max_chars
        and (bool(e.turns) or len(e.prompt) > max(max_chars - len(e.completion), max_chars // 2))
        for e in documents
    )
    if cut:
        what = (
            f"{cut} of {len(documents)} documents are longer than {max_chars} characters and lose "
            "the beginning of their prompt"
        )
        progress.say_once(f"[data] {what} (max_chars)")


def _prompt_end(prompt: str, room: int) -> str:
    """The end of the prompt in at most `room` characters, from the start of a word if one starts there."""
    start = len(prompt) - room
    if start <= 0:
        return prompt
    word = re.compile(r"(?<=\s)\S").search(prompt, start)
    return prompt[word.start() :] if word else prompt[start:]
