"""How much of one text stands verbatim in another."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from deepfusion.text.rows import Document


def overlap(documents: Iterable[Document], others: Iterable[Document], n: int = 13) -> float:
    """Share (0 to 1) of the distinct n-word runs of `documents` that stand word for word in `others`.

    A text of fewer than n words counts as one run.
    """
    wanted: dict[int, set[str]] = defaultdict(set)
    for document in documents:
        words = document.text.split()
        if words:
            length = min(n, len(words))
            wanted[length] |= _runs(words, length)
    found = set()
    for other in others:
        words = other.text.split()
        for length, runs in wanted.items():
            found |= runs & _runs(words, length)
    total = sum(map(len, wanted.values()))
    return len(found) / total if total else 0.0


def _runs(words: list[str], length: int) -> set[str]:
    return {" ".join(words[at : at + length]) for at in range(len(words) - length + 1)}
