"""Documents for devices and server: windows, splits, partition over devices, encoding, reading order, overlap."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from deepfusion import progress
from deepfusion.chat import chat_template, places, render
from deepfusion.config import Config, DeviceSpec
from deepfusion.errors import InputError
from deepfusion.names import device_ids
from deepfusion.rows import Example, Turn, conversation
from deepfusion.sources import choose, expand_source, load_source, shuffled, unique, write_jsonl

__all__ = [
    "Encoded",
    "Example",
    "Splits",
    "encode",
    "load_source",
    "make_splits",
    "overlap",
    "partition",
    "prompt_ids",
    "reading_order",
    "windows",
    "write_jsonl",
]

HELD_OUT = 0.1  # share of a device's documents that it keeps to measure its own losses
LEAST = 2  # documents of a device: one to train on, one held out
LEAST_SHARED = 8  # documents that the partition gives every device where there are enough
POOL = 16  # batches among which documents are sorted by length

Scheme = Literal["by_domain", "random_uneven", "dirichlet"]


# Windows ------------------------------------------------------------------------------------------------------------


def windows(example: Example, max_chars: int) -> list[Example]:
    """Cut a text that is longer than `max_chars` characters at whitespace (inside a word where there is none).

    A short completion keeps the end of its prompt in one window. A completion of more than half a window is cut into
    consecutive windows, the first with the end of the prompt in at most half of it, the others without a prompt. The
    completions of the windows make up the whole completion. Options survive where there is one window. A conversation is cut
    between its exchanges.

    Raises:
        InputError: windows of less than two characters.
    """
    if max_chars < 2:
        raise InputError(f"max_chars={max_chars}", allowed="2 or more", code="bad-value")
    if len(example.text) <= max_chars:
        return [example]
    if example.turns:
        return _chat_windows(example, max_chars)
    prompt, completion, domain = example.prompt, example.completion, example.domain
    if len(completion) <= max_chars // 2:
        prompt = _prompt_end(prompt, max_chars - len(completion))
        return [Example(prompt, completion, domain, example.options, example.answer)]
    prompt = _prompt_end(prompt, max_chars // 2)
    pieces = _cut_text(completion, max_chars - len(prompt), max_chars)
    if len(pieces) == 1:
        return [Example(prompt, completion, domain, example.options, example.answer)]
    return [Example(prompt, pieces[0], domain), *(Example("", piece, domain) for piece in pieces[1:])]


def _cut_text(text: str, first: int, room: int) -> list[str]:
    """Pieces of at most `room` characters, the first of at most `first`, each but the first from a white space if there is one."""
    pieces, start, size = [], 0, first
    while len(text) - start > size:
        end = next((index for index in range(start + size, start, -1) if text[index].isspace()), start + size)
        pieces.append(text[start:end])
        start, size = end, room
    return [*pieces, text[start:]]


def _chat_windows(example: Example, max_chars: int) -> list[Example]:
    """As many exchanges as fit in each window: an exchange ends with a learned turn, and every learned turn is in one window.

    Of an exchange that does not fit, the end of what was said last before it and the beginning of the learned turn make one
    window, and the rest of that turn plain texts.
    """
    cut: list[Example] = []
    kept: list[Turn] = []
    exchange: list[Turn] = []
    for turn in example.turns:
        exchange.append(turn)
        if not turn.learned:
            continue
        if kept and len(conversation(kept + exchange, example.domain).text) > max_chars:
            cut.append(conversation(kept, example.domain))
            kept = []
        kept += exchange
        if len(conversation(kept, example.domain).text) > max_chars:
            cut += _long_exchange(exchange, example.domain, max_chars)
            kept = []
        exchange = []
    return [*cut, conversation(kept, example.domain)] if kept else cut


def _long_exchange(exchange: list[Turn], domain: str, max_chars: int) -> list[Example]:
    *before, answer = exchange
    labels = len(answer.label) + 1 + sum(len(turn.label) + 2 for turn in before[-1:])
    room = max(max_chars - labels, 2)
    asked = [turn._replace(content=_prompt_end(turn.content, max(room - len(answer.content), room // 2))) for turn in before[-1:]]
    pieces = _cut_text(answer.content, room - sum(len(turn.content) for turn in asked), max_chars)
    first = conversation([*asked, answer._replace(content=pieces[0])], domain)
    return [first, *(Example("", piece, domain) for piece in pieces[1:])]


def say_cut(examples: Sequence[Example], max_chars: int) -> None:
    """Tell how many documents do not fit in a window with all that stands before what is learned."""
    cut = sum(
        len(e.text) > max_chars and (bool(e.turns) or len(e.prompt) > max(max_chars - len(e.completion), max_chars // 2))
        for e in examples
    )
    if cut:
        what = f"{cut} of {len(examples)} documents are longer than {max_chars} characters and lose the beginning of their prompt"
        progress.say_once(f"[data] {what} (max_chars)")


def _prompt_end(prompt: str, room: int) -> str:
    """The end of the prompt in at most `room` characters, from the start of a word if one starts there."""
    start = len(prompt) - room
    if start <= 0:
        return prompt
    word = re.compile(r"(?<=\s)\S").search(prompt, start)
    return prompt[word.start() :] if word else prompt[start:]


# Splits -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Splits:
    """Who sees which documents. No test document stands anywhere else; no device shares a document with another.

    Attributes:
        private: device id -> the documents it trains on.
        held_out: device id -> its own documents kept for its losses before and after training.
        public: in-domain documents and files that the server may use.
        generic: public documents that have nothing to do with the devices.
        test: documents that only evaluation sees.
        devices: every device with its id and type, in the order of `private`.
    """

    private: dict[str, list[Example]]
    held_out: dict[str, list[Example]]
    public: list[Example]
    generic: list[Example]
    test: list[Example]
    devices: list[DeviceSpec]


def make_splits(config: Config) -> Splits:
    """Split all documents; a pure function of the config and of the contents of its sources.

    Each source (a file of a glob counts as one) gives its share to test and, where `data.public` names in_domain, to
    public. A document that two sources hold belongs to the first.

    Without any private source there are no devices, only what the server has.

    Raises:
        InputError: a bad source, or too few documents for the devices.
    """
    data, seed = config.data, config.seed
    common = _expand([data.private] if isinstance(data.private, str) else data.private)
    devices, own = _resolve_devices(config, common)
    if not common and not any(own.values()):
        devices = []  # a server knows no private data: the uploads come from elsewhere
    test = load_source(data.test) if isinstance(data.test, str) else []
    taken = {example.id for example in test}
    public: list[Example] = []
    kept: dict[str, list[Example]] = {}
    for source in dict.fromkeys([*common, *(part for parts in own.values() for part in parts)]):
        given = load_source(source, data.limit, seed)
        found = unique(given, without=taken)
        if len(found) < len(given):
            what = f"{len(given) - len(found)} of {len(given)} documents are left out: in the test text or in an earlier source"
            progress.say_once(f"[data] {source}: {what}")
        taken |= {example.id for example in found}
        counts = _split_counts(len({example.id for example in found}), config)
        texts = [*_alike(found, seed)]
        if len(texts) < sum(counts) + 1:
            raise InputError(f"{len(found)} new documents are too few to split", where=source, code="too-few-documents")
        test += chain(*texts[: counts[0]])
        public += chain(*texts[counts[0] : sum(counts)])
        kept[source] = [*chain(*texts[sum(counts) :])]
    parts = _deal(devices, own, common, kept, config)
    private, held_out = {}, {}
    for device, documents in parts.items():
        count = max(1, round(HELD_OUT * len(documents)))
        order = shuffled(documents, seed, "held_out")
        held_out[device], private[device] = order[:count], order[count:]
    say_cut([*test, *public, *chain(*parts.values())], data.max_chars)
    return Splits(private, held_out, *_server_text(config, public, test), test, devices)


def _alike(examples: list[Example], seed: int) -> Iterable[list[Example]]:
    """In an order by seed the examples of each id, which differ in case and white space alone: they stay on one side of a split."""
    groups: dict[str, list[Example]] = {}
    for example in shuffled(examples, seed, "split"):
        groups.setdefault(example.id, []).append(example)
    return groups.values()


def _expand(sources: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(part for source in sources for part in expand_source(source)))


def _split_counts(documents: int, config: Config) -> tuple[int, int]:
    """Numbers of test and of public documents of a source."""
    share = config.data.test
    test = max(1, round(share * documents)) if isinstance(share, float) else 0
    public = max(1, round(config.data.public_fraction * documents)) if "in_domain" in config.data.public else 0
    return test, public


def _server_text(config: Config, in_domain: list[Example], test: list[Example]) -> tuple[list[Example], list[Example]]:
    """Public and generic text without the test documents."""
    data, test_ids = config.data, {example.id for example in test}
    named = [source for source in data.public if source not in ("in_domain", "generic", "sampled")]
    files = [example for source in named for example in load_source(source, data.limit, config.seed)]
    generic: list[Example] = []
    if "generic" in data.public:
        generic = unique((example for source in data.generic for example in load_source(source)), without=test_ids)
        generic = choose(generic, data.generic_documents, config.seed, "generic")
    return unique([*in_domain, *files], without=test_ids), generic


def _resolve_devices(config: Config, common: list[str]) -> tuple[list[DeviceSpec], dict[str, list[str]]]:
    """Devices with id and type, and the sources of those that name their own."""
    if isinstance(config.devices, list):
        used = {device.id for device in config.devices}
        free = (name for name in _numbered(2 * len(config.devices)) if name not in used)
        devices = [device if device.id else device.model_copy(update={"id": next(free)}) for device in config.devices]
        named = {str(device.id): [device.data] if isinstance(device.data, str) else device.data for device in devices}
        return devices, {name: _expand(data) for name, data in named.items() if data}
    count = len(common) if config.devices is None else config.devices
    types = np.random.default_rng(config.seed).choice(config.device.types, size=count).tolist()
    if config.devices is not None:
        return [DeviceSpec(id=name, type=kind) for name, kind in zip(_numbered(count), types, strict=True)], {}
    rows = list(zip(device_ids([Path(source).stem for source in common]), types, common, strict=True))
    devices = [DeviceSpec(id=name, type=kind, data=source) for name, kind, source in rows]
    return devices, {name: [source] for name, _, source in rows}


def _numbered(count: int) -> list[str]:
    return [f"d{index:02d}" for index in range(count)]


def _deal(
    devices: list[DeviceSpec],
    own: dict[str, list[str]],
    common: list[str],
    kept: dict[str, list[Example]],
    config: Config,
) -> dict[str, list[Example]]:
    """The private documents of every device."""
    parts: dict[str, list[Example]] = {str(device.id): [] for device in devices}
    users = defaultdict(list)
    for name, sources in own.items():
        for source in sources:
            users[source].append(name)
    scheme, alpha = config.data.partition.scheme, config.data.partition.alpha
    for number, (source, names) in enumerate(users.items()):
        if len(names) > 1 and len(kept[source]) < LEAST_SHARED * len(names):
            raise InputError(
                f"{len(kept[source])} private documents of {source} for {len(names)} devices",
                where=f"device {names[-1]}",
                allowed=f"at least {LEAST_SHARED} documents a device",
                code="too-few-documents",
            )
        shares = partition(kept[source], len(names), "random_uneven", alpha, config.seed + number, least=LEAST_SHARED)
        for name, share in zip(names, shares, strict=True):
            parts[name] += share
    others = [name for name in parts if name not in own]
    pool = [example for source in common if source not in users for example in kept[source]]
    if others:
        if len(pool) < LEAST * len(others):
            raise InputError(
                f"{len(pool)} private documents of data.private for {len(others)} devices",
                where=f"device {others[-1]}",
                allowed=f"at least {LEAST} documents a device",
                fix="more documents or fewer devices",
                code="too-few-documents",
            )
        shares = partition(pool, len(others), scheme, alpha, config.seed, least=LEAST_SHARED)
        parts |= zip(others, shares, strict=True)
    for name, documents in parts.items():
        if len(documents) < LEAST:
            what = f"{len(documents)} private documents"
            raise InputError(what, where=f"device {name}", allowed=f"at least {LEAST}", code="too-few-documents")
    return parts


# Partition ----------------------------------------------------------------------------------------------------------


def partition(
    examples: Sequence[Example], devices: int, scheme: Scheme, alpha: float, seed: int, *, least: int = 1
) -> list[list[Example]]:
    """Give every document to exactly one device.

    Args:
        scheme: random_uneven deals shuffled documents in Dirichlet(alpha) sizes; by_domain gives domains to devices in
            proportion, in uneven sizes (domains too many or too small for a device of their own join the device with
            the fewest documents); dirichlet draws for each domain how it spreads over the devices.
        least: documents of every device, or the mean where that is less.

    Raises:
        InputError: fewer documents than devices.
    """
    if len(examples) < devices:
        what = f"{len(examples)} documents for {devices} devices"
        raise InputError(what, fix="fewer devices", code="too-few-documents")
    generator = np.random.default_rng(seed)
    least = min(least, len(examples) // devices)
    order = generator.permutation(len(examples)).tolist()
    domains: dict[str, list[int]] = defaultdict(list)
    for index in order:
        domains[examples[index].domain].append(index)
    groups = [domains[domain] for domain in sorted(domains)]
    if scheme == "random_uneven":
        parts = _cut(order, _uneven_sizes(len(order), devices, alpha, least, generator))
    elif scheme == "dirichlet":
        cuts = [_cut(group, _uneven_sizes(len(group), devices, alpha, 0, generator)) for group in groups]
        parts = [[index for cut in cuts for index in cut[device]] for device in range(devices)]
    else:
        parts = _by_domain(groups, devices, alpha, least, generator)
    while min(map(len, parts)) < least:
        min(parts, key=len).append(max(parts, key=len).pop())
    return [[examples[index] for index in sorted(part)] for part in parts]


def _by_domain(groups: list[list[int]], devices: int, alpha: float, least: int, generator: np.random.Generator) -> list[list[int]]:
    groups = sorted(groups, key=len, reverse=True)
    large = [group for group in groups if len(group) >= least][:devices] or groups[:devices]
    # Largest remainder, each domain at least one device.
    exact = np.array([len(group) for group in large]) * devices / sum(map(len, large))
    seats = np.maximum(1, np.floor(exact)).astype(int)
    while seats.sum() != devices:
        step = 1 if seats.sum() < devices else -1
        seats[np.argmax(np.where((step < 0) & (seats == 1), -np.inf, step * (exact - seats)))] += step
    parts = []
    for group, count in zip(large, seats.tolist(), strict=True):
        parts += _cut(group, _uneven_sizes(len(group), count, alpha, least, generator))
    for group in groups[len(large) :]:
        min(parts, key=len).extend(group)
    return parts


def _uneven_sizes(total: int, parts: int, alpha: float, least: int, generator: np.random.Generator) -> list[int]:
    """Sizes that add up to `total`: `least` each (the mean where that is less) and the rest by Dirichlet(alpha)."""
    least = min(least, total // parts)
    return (least + generator.multinomial(total - least * parts, generator.dirichlet([alpha] * parts))).tolist()


def _cut(items: list[int], sizes: list[int]) -> list[list[int]]:
    ends = np.cumsum(sizes).tolist()
    return [items[end - size : end] for end, size in zip(ends, sizes, strict=True)]


# Tokens -------------------------------------------------------------------------------------------------------------


class Encoded(NamedTuple):
    """Tokens of one example.

    Attributes:
        input_ids: int64 [T].
        offsets: int32 [T, 2], the characters of `example.text` that a token stands for; equal ends for marks.
        weights: float32 [T], the loss weight of each token as a target.
        template: the chat template that wrote the text; empty for plain text.
    """

    input_ids: np.ndarray
    offsets: np.ndarray
    weights: np.ndarray
    template: str = ""


def encode(
    tokenizer: PreTrainedTokenizerBase,
    example: Example,
    prompt_weight: float = 0.0,
    max_tokens: int | None = None,
    add_end: bool = True,
) -> Encoded:
    """Tokenize a document as one text, with a start mark and, by default, an end mark.

    The start mark (BOS, else EOS) weighs 0, what is learned and the end mark 1, all else `prompt_weight`. A token that
    straddles the border belongs to what is learned. Longer sequences than `max_tokens` are cut on the right.

    A conversation is read as the tokenizer's own chat template writes it, where it has one; the marks are then the template's,
    and every learned turn ends with one.

    Raises:
        InputError: no character offsets (a slow tokenizer), no special token to mark start and end, or turns that the chat
            template cannot write.
    """
    where = tokenizer.name_or_path
    if not tokenizer.is_fast:
        what = "the tokenizer gives no character offsets"
        raise InputError(what, where=where, allowed="fast tokenizers", code="slow-tokenizer")
    if example.turns and chat_template(tokenizer):
        encoded = _encode_chat(tokenizer, example, prompt_weight, add_end)
    else:
        encoded = _encode_plain(tokenizer, example, prompt_weight, add_end)
    ids, offsets, weights, template = encoded
    return Encoded(ids[:max_tokens], offsets[:max_tokens], weights[:max_tokens], template)


def _encode_plain(tokenizer: PreTrainedTokenizerBase, example: Example, prompt_weight: float, add_end: bool) -> Encoded:
    end_mark = tokenizer.eos_token_id
    start_mark = end_mark if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if start_mark is None or (add_end and end_mark is None):
        raise InputError("the tokenizer has no end-of-text token", where=tokenizer.name_or_path, code="no-end-token")
    text = example.text
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False)
    marks = [(0, 0)], [(len(text), len(text))] if add_end else []
    ids = [start_mark, *tokens["input_ids"], *([end_mark] if add_end else [])]
    offsets = np.array([*marks[0], *tokens["offset_mapping"], *marks[1]], np.int32).reshape(-1, 2)
    weights = np.full(len(ids), prompt_weight, np.float32)
    for start, end in example.learned:
        weights[(offsets[:, 1] > start) & ((offsets[:, 0] < end) | (offsets[:, 1] == end))] = 1.0
    weights[0] = 0.0
    if add_end:
        weights[-1] = 1.0
    return Encoded(np.array(ids, np.int64), offsets, weights)


def _encode_chat(tokenizer: PreTrainedTokenizerBase, example: Example, prompt_weight: float, add_end: bool) -> Encoded:
    rendered = render(tokenizer, example)
    tokens = tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False)
    begins, ends = np.array(tokens["offset_mapping"], np.int64).reshape(-1, 2).T
    starts_at, ends_at = places(example, rendered)
    first = starts_at[np.minimum(begins, len(starts_at) - 1)]
    last = np.maximum(ends_at[np.maximum(ends - 1, 0)], first)
    weights = np.full(len(begins), prompt_weight, np.float32)
    kept = len(begins)
    for turn, (start, end), (_, stop) in zip(example.turns, rendered.spans, example.contents, strict=True):
        inside = (ends > start) & (begins < end)
        last[inside] = np.minimum(last[inside], stop)  # a token that runs into what the template writes next
        after = int(np.searchsorted(begins, end))  # the mark that ends the turn
        if turn.learned:
            weights[inside] = 1.0
            weights[after : after + 1] = 1.0 if add_end else prompt_weight
            kept = after + add_end
    ids = np.array(tokens["input_ids"], np.int64)[:kept]
    return Encoded(ids, np.stack([first, last], 1).astype(np.int32)[:kept], weights[:kept], chat_template(tokenizer) or "")


def prompt_ids(tokenizer: PreTrainedTokenizerBase, example: Example) -> list[int]:
    """Tokens of all that stands before the last completion, with the start mark, for a model to go on from."""
    if example.turns and chat_template(tokenizer):
        rendered = render(tokenizer, example)
        return list(tokenizer(rendered.text[: rendered.spans[-1][0]], add_special_tokens=False, verbose=False).input_ids)
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return [start, *tokenizer(example.prompt, add_special_tokens=False, verbose=False).input_ids]


def training_steps(steps: int, epochs: float | None, documents: int, batch_size: int) -> int:
    """Optimizer steps of a training that may pass at most `epochs` times over its documents; at least one."""
    return steps if epochs is None else max(1, min(steps, round(epochs * documents / batch_size)))


def reading_order(
    lengths: Sequence[int], steps: int, batch_size: int, seed: int, every: Sequence[int] | None = None
) -> list[list[int]]:
    """The documents of each batch of a training: `steps` lists of `batch_size` indexes into `lengths`.

    Epoch after epoch in seeded random order, so that the counts of any two documents differ by one at most. Documents
    of similar length share a batch to save padding (sorted within pools of 16 batches, the batches of a pool shuffled).

    Args:
        every: document i stands in every `every[i]`-th epoch; default 1 for all.
    """
    if not lengths:
        raise InputError("there are no documents to train on", code="no-data")
    generator = np.random.default_rng(seed)
    total = steps * batch_size
    stream: list[int] = []
    ends: list[int] = []
    while len(stream) < total:
        order = generator.permutation(len(lengths)).tolist()
        stream += order if every is None else [index for index in order if (index + len(ends)) % every[index] == 0]
        ends.append(len(stream))
    batches: list[list[int]] = []
    start = 0
    while start < total:
        # A pool ends with its epoch, or a document would often stand twice in one batch.
        epoch_end = next(end for end in ends if end > start)
        end = min(start + POOL * batch_size, -(-epoch_end // batch_size) * batch_size, total)
        pool = sorted(stream[start:end], key=lambda index: lengths[index])
        cut = [pool[at : at + batch_size] for at in range(0, len(pool), batch_size)]
        batches += [cut[index] for index in generator.permutation(len(cut))]
        start = end
    return batches


# Overlap ------------------------------------------------------------------------------------------------------------


def overlap(examples: Iterable[Example], others: Iterable[Example], n: int = 13) -> float:
    """Share (0 to 1) of the distinct n-word runs of `examples` that stand word for word in `others`.

    A text of fewer than n words counts as one run.
    """
    wanted: dict[int, set[str]] = defaultdict(set)
    for example in examples:
        words = example.text.split()
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
