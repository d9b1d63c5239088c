"""Windows, splits, partition, encoding, reading order and overlap."""

from __future__ import annotations

from collections import Counter
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from deepfusion import progress
from deepfusion.errors import InputError
from deepfusion.learning.order import reading_order, training_steps
from deepfusion.names import is_device_id
from deepfusion.schema import Config
from deepfusion.text.encoding import encode
from deepfusion.text.overlap import overlap
from deepfusion.text.partition import partition
from deepfusion.text.rows import Document
from deepfusion.text.sources import write_jsonl
from deepfusion.text.splits import Splits, make_splits
from deepfusion.text.windows import cut_windows, say_cut

WORDS = st.lists(st.text("ab é\n", max_size=9), max_size=60).map(" ".join)


# Windows


@settings(deadline=None)
@given(WORDS, WORDS.filter(str.strip), st.integers(8, 64))
def test_windows_hold_the_whole_completion_once(prompt: str, completion: str, max_chars: int) -> None:
    document = Document(prompt, completion, "d")
    cut = cut_windows(document, max_chars)
    assert "".join(window.completion for window in cut) == completion
    assert all(0 < len(window.text) <= max_chars and window.completion for window in cut)
    assert prompt.endswith(cut[0].prompt)
    assert not any(window.prompt for window in cut[1:])
    assert len(document.text) > max_chars or cut == [document]


@settings(deadline=None)
@given(WORDS, WORDS.filter(str.strip), st.integers(8, 64))
def test_a_prompt_that_loses_its_beginning_is_told(prompt: str, completion: str, max_chars: int) -> None:
    document = Document(prompt, completion, "d")
    progress._said.clear()
    with redirect_stderr(StringIO()) as told:
        say_cut([document, Document("", "x" * 999, "d")], max_chars)
    lost = cut_windows(document, max_chars)[0].prompt != prompt
    assert ("1 of 2 documents are longer" in told.getvalue()) == lost


def test_a_short_completion_keeps_the_end_of_its_prompt_and_its_options() -> None:
    document = Document("one two three four five", " B. no", "d", (" A. so", " B. no"), 1)
    assert cut_windows(document, 20) == [Document("four five", " B. no", "d", (" A. so", " B. no"), 1)]


def test_a_long_completion_is_cut_at_whitespace() -> None:
    cut = cut_windows(Document("why is that so?", " one two three four five", "d", (" x", " y"), 0), 16)
    assert [(window.prompt, window.completion) for window in cut] == [
        ("that so?", " one two"),
        ("", " three four five"),
    ]
    assert not any(window.options for window in cut)


def test_a_word_longer_than_the_window_is_cut_inside() -> None:
    assert [window.completion for window in cut_windows(Document("", "x" * 10, "d"), 4)] == [
        "xxxx",
        "xxxx",
        "xx",
    ]


# Partition


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from("abcde"), min_size=1, max_size=120),
    st.integers(1, 12),
    st.sampled_from(["by_domain", "random_uneven", "dirichlet"]),
    st.floats(0.01, 100),
    st.tuples(st.integers(0, 99), st.integers(1, 9)),
)
def test_every_document_goes_to_exactly_one_device_and_none_is_empty(
    domains: list[str], devices: int, scheme: Any, alpha: float, seed_and_least: tuple[int, int]
) -> None:
    seed, least = seed_and_least
    documents = [Document("", f"{number}", domain) for number, domain in enumerate(domains)]
    if len(documents) < devices:
        with pytest.raises(InputError, match="fewer devices"):
            partition(documents, devices, scheme, alpha, seed)
        return
    parts = partition(documents, devices, scheme, alpha, seed, least=least)
    assert len(parts) == devices
    assert sorted(document.text for part in parts for document in part) == sorted(
        document.text for document in documents
    )
    assert min(map(len, parts)) >= min(least, len(documents) // devices)
    assert parts == partition(documents, devices, scheme, alpha, seed, least=least)


def three_domains() -> list[Document]:
    return [
        Document("", f"{domain}{number}", domain)
        for domain, count in {"a": 300, "b": 100, "c": 95, "z": 5}.items()
        for number in range(count)
    ]


def test_by_domain_gives_a_device_one_domain_in_proportion() -> None:
    parts = partition(three_domains(), 10, "by_domain", 2.0, 0, least=8)
    homes = Counter(Counter(document.domain for document in part).most_common(1)[0][0] for part in parts)
    assert homes == {"a": 6, "b": 2, "c": 2}
    # Five documents are too few for a device of 8, so they join the smallest.
    assert sum(len({document.domain for document in part}) > 1 for part in parts) == 1
    assert len({len(part) for part in parts}) > 5


def test_by_domain_with_fewer_devices_than_domains_keeps_domains_whole() -> None:
    parts = partition(three_domains(), 2, "by_domain", 2.0, 0)
    assert sorted(map(len, parts)) == [200, 300]


def test_alpha_sets_how_uneven_devices_are() -> None:
    def spread(scheme: Any, alpha: float) -> float:
        return float(np.std([len(part) for part in partition(three_domains(), 10, scheme, alpha, 0)]))

    assert spread("random_uneven", 0.3) > spread("random_uneven", 3) > spread("random_uneven", 300)
    skewed, even = (partition(three_domains(), 10, "dirichlet", alpha, 0) for alpha in (0.05, 1000))
    share = [
        np.mean([max(Counter(e.domain for e in part).values()) / len(part) for part in parts])
        for parts in (skewed, even)
    ]
    assert share[0] > share[1] + 0.1


# Splits


def documents(path: Path, name: str, count: int, start: int = 0) -> str:
    write_jsonl(
        [Document("", f"{name} document number {n}", name) for n in range(start, start + count)],
        path / f"{name}.jsonl",
    )
    return str(path / f"{name}.jsonl")


def split(data: dict[str, Any], devices: Any = 4, seed: int = 0) -> Splits:
    return make_splits(Config.model_validate({"seed": seed, "devices": devices, "data": data}))


def ids(documents: list[Document]) -> set[str]:
    return {document.id for document in documents}


def check(splits: Splits) -> None:
    """What holds for every split: nobody sees test documents, nobody shares private ones."""
    names = [device.id for device in splits.devices]
    assert list(splits.private) == list(splits.held_out) == names
    private = [ids(part) for parts in (splits.private, splits.held_out) for part in parts.values()]
    assert all(private)
    assert sum(map(len, private)) == len(set().union(*private))
    test = ids(splits.test)
    assert len(test) == len(splits.test) > 0
    for seen in (*private, ids(splits.public), ids(splits.generic)):
        assert not seen & test
    for name, part in splits.private.items():
        assert len(splits.held_out[name]) == max(1, round(0.1 * (len(part) + len(splits.held_out[name]))))


def test_a_number_of_devices(tmp_path: Path) -> None:
    sources = [documents(tmp_path, "alpha", 200), documents(tmp_path, "beta", 100)]
    splits = split({"private": sources, "test": 0.1, "public_fraction": 0.2})
    check(splits)
    assert [device.id for device in splits.devices] == ["d00", "d01", "d02", "d03"]
    assert {device.type for device in splits.devices} <= {"gpt2", "gpt2-medium", "tinyllama"}
    assert Counter(e.domain for e in splits.test) == {"alpha": 20, "beta": 10}
    assert Counter(e.domain for e in splits.public) == {"alpha": 40, "beta": 20}
    assert sum(len(part) for parts in (splits.private, splits.held_out) for part in parts.values()) == 210
    assert not splits.generic


def test_splits_depend_on_the_config_only(tmp_path: Path) -> None:
    source = documents(tmp_path, "alpha", 200)
    assert split({"private": source}) == split({"private": source})
    assert ids(split({"private": source}).test) != ids(split({"private": source}, seed=1).test)


def test_a_device_for_every_file(tmp_path: Path) -> None:
    first, second = documents(tmp_path, "ward", 40), documents(tmp_path, "bank", 30)
    splits = split({"private": str(tmp_path / "*.jsonl")}, devices=None)
    check(splits)
    assert [(device.id, device.data) for device in splits.devices] == [("bank", second), ("ward", first)]
    for name, part in splits.private.items():
        assert {document.domain for document in part} == {name}


def test_devices_are_called_as_their_files_and_never_two_alike(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    sources = [documents(tmp_path, name, 30) for name in ("больница", "my ward (1)", "my ward [1]", "x" * 64)]
    twin = tmp_path / "other" / "больница.jsonl"
    sources.append(str(Path(documents(tmp_path, "elsewhere", 30)).rename(twin)))
    devices = split({"private": sources}, devices=None).devices
    assert [device.data for device in devices] == sources
    names = [str(device.id) for device in devices]
    assert all(map(is_device_id, names))
    assert len(set(names)) == len(sources)
    assert "больница" in names
    assert names[1].startswith("my-ward-1-")


def test_listed_devices_share_their_sources_unevenly(tmp_path: Path) -> None:
    first, second, pool = (documents(tmp_path, name, 200) for name in ("alpha", "beta", "gamma"))
    devices = [
        {"id": "x", "type": "gpt2", "data": first},
        {"id": "d00", "type": "gpt2", "data": [first, second]},
        {"type": "tinyllama"},
        {"type": "tinyllama"},
    ]
    splits = split({"private": pool}, devices)
    check(splits)
    assert [device.id for device in splits.devices] == ["x", "d00", "d01", "d02"]
    domains = [{document.domain for document in part} for part in splits.private.values()]
    assert domains == [{"alpha"}, {"alpha", "beta"}, {"gamma"}, {"gamma"}]
    assert abs(len(splits.private["x"]) - sum(e.domain == "alpha" for e in splits.private["d00"])) > 5


def test_a_test_file_is_taken_out_of_everything(tmp_path: Path) -> None:
    source = documents(tmp_path, "alpha", 100)
    public, generic = documents(tmp_path, "public", 50), documents(tmp_path, "generic", 50)
    seen = [
        Document("", f"{name.upper()}  document number {n}", "t")
        for name in ("alpha", "public", "generic")
        for n in range(10)
    ]
    write_jsonl(seen, tmp_path / "test.jsonl")
    data = {
        "private": source,
        "test": str(tmp_path / "test.jsonl"),
        "public": ["in_domain", "generic", public],
        "generic": [generic],
    }
    splits = split(data)
    check(splits)
    assert splits.test == seen
    assert len(splits.generic) == 40
    assert Counter(document.domain for document in splits.public) == {"alpha": round(0.15 * 90), "public": 40}


def test_no_window_of_a_test_document_reaches_a_device_or_the_server(tmp_path: Path) -> None:
    long = [Document("", " ".join(f"w{n}x{k}" for k in range(200)), "long") for n in range(40)]
    write_jsonl(long, tmp_path / "long.jsonl")
    splits = split({"private": str(tmp_path / "long.jsonl")})
    others = [
        e for parts in (splits.private, splits.held_out) for part in parts.values() for e in part
    ] + splits.public
    assert not {w.text for e in splits.test for w in cut_windows(e, 128)} & {
        w.text for e in others for w in cut_windows(e, 128)
    }
    assert overlap(splits.test, others) == 0.0


def test_variants_in_case_and_spacing_are_kept_and_stay_on_one_side(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_said", set())
    texts = [f"Poem number {number}" for number in range(60)]
    variants = [text.upper() for text in texts[:20]] + [text.replace(" ", "\n") for text in texts[10:30]]
    write_jsonl([Document("", text, "d") for text in [*texts, *variants]], tmp_path / "a.jsonl")
    write_jsonl(
        [Document("", text, "d") for text in ["another", "again", "Poem  number 3", *map(str, range(9))]],
        tmp_path / "b.jsonl",
    )
    splits = split(
        {
            "private": [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")],
            "test": 0.2,
            "public_fraction": 0.2,
        },
        devices=1,
    )
    private = [*splits.private["d00"], *splits.held_out["d00"]]
    assert len(splits.test) + len(splits.public) + len(private) == len(texts) + len(variants) + 11
    assert not ids(splits.test) & (ids(private) | ids(splits.public))
    assert (
        "1 of 12 documents are left out: in the test text or in an earlier source" in capsys.readouterr().err
    )


def test_a_document_of_two_sources_belongs_to_the_first(tmp_path: Path) -> None:
    write_jsonl([Document("", f"text {n}", "d") for n in range(60)], tmp_path / "a.jsonl")
    write_jsonl([Document("", f"TEXT {n}", "d") for n in range(30, 90)], tmp_path / "b.jsonl")
    splits = split({"private": [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]})
    check(splits)
    assert len(splits.test) == 6 + 3


def test_without_in_domain_no_private_source_gives_public_text(tmp_path: Path) -> None:
    splits = split({"private": documents(tmp_path, "alpha", 100), "public": ["sampled"]})
    assert splits.public == splits.generic == []
    check(splits)


def test_limits(tmp_path: Path) -> None:
    data = {
        "private": documents(tmp_path, "alpha", 100),
        "limit": 50,
        "public": ["generic"],
        "generic_documents": 7,
    }
    splits = split(data | {"generic": [documents(tmp_path, "generic", 50)]})
    check(splits)
    assert (
        len(splits.test) + sum(len(p) for parts in (splits.private, splits.held_out) for p in parts.values())
        == 50
    )
    assert len(splits.generic) == 7


def test_too_little_data(tmp_path: Path) -> None:
    source = documents(tmp_path, "alpha", 20)
    assert (
        split({}).devices == []
    )  # a server knows no private data; the device stage refuses to go on without
    with pytest.raises(InputError, match="16 devices"):
        split({"private": source}, devices=16)
    with pytest.raises(InputError, match="device b"):
        split({}, [{"id": name, "type": "gpt2", "data": source} for name in "ab"])
    with pytest.raises(InputError, match="device c"):
        split({}, [{"id": "a", "type": "gpt2", "data": source}, {"id": "c", "type": "gpt2"}])
    with pytest.raises(InputError, match=r"one\.jsonl: 1 new documents"):
        split({"private": documents(tmp_path, "one", 1)}, devices=None)


# Tokens


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    backend.train_from_iterator(["Answer: yes or no, yes or no"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@settings(max_examples=50, deadline=None)
@given(WORDS, WORDS.filter(str.strip), st.sampled_from([0.0, 0.5]))
def test_tokens_cover_the_text_and_weigh_the_completion(
    tokenizer: PreTrainedTokenizerFast, prompt: str, completion: str, prompt_weight: float
) -> None:
    document = Document(prompt, completion, "d")
    tokens = encode(tokenizer, document, prompt_weight)
    assert (tokens.input_ids.dtype, tokens.offsets.dtype, tokens.weights.dtype) == (
        np.int64,
        np.int32,
        np.float32,
    )
    assert len(tokens.input_ids) == len(tokens.offsets) == len(tokens.weights)
    assert tokens.input_ids[[0, -1]].tolist() == [tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert tokens.offsets[[0, -1]].tolist() == [[0, 0], [len(document.text)] * 2]
    assert tokens.weights[[0, -1]].tolist() == [0.0, 1.0]
    covered = {place for start, end in tokens.offsets for place in range(start, end)}
    assert covered == set(range(len(document.text)))
    for (_, end), weight in zip(tokens.offsets[1:-1], tokens.weights[1:-1], strict=True):
        assert weight == (1.0 if end > len(prompt) else prompt_weight)
    assert tokenizer.decode(tokens.input_ids[1:-1]) == document.text


def test_a_token_across_the_border_belongs_to_the_completion(tokenizer: PreTrainedTokenizerFast) -> None:
    whole = encode(tokenizer, Document("Answer: y", "es", "d"), add_end=False)
    assert whole.offsets[-1].tolist() == [7, 11]
    assert whole.weights.tolist() == [0.0] * (len(whole.weights) - 1) + [1.0]


def test_long_sequences_are_cut_on_the_right(tokenizer: PreTrainedTokenizerFast) -> None:
    document = Document("Answer:", " yes or no", "d")
    whole, cut = encode(tokenizer, document), encode(tokenizer, document, max_tokens=3)
    assert all(np.array_equal(part[:3], short) for part, short in zip(whole, cut, strict=True))


def test_the_end_mark_starts_texts_of_tokenizers_without_a_start_mark(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    backend = tokenizer.backend_tokenizer
    without_start = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    assert encode(without_start, Document("", "yes", "d")).input_ids[0] == without_start.eos_token_id
    with pytest.raises(InputError, match="no end-of-text token"):
        encode(PreTrainedTokenizerFast(tokenizer_object=backend), Document("", "yes", "d"))


def test_slow_tokenizers_are_refused(tmp_path: Path) -> None:
    from transformers import CanineTokenizer

    with pytest.raises(InputError, match="character offsets"):
        encode(CanineTokenizer(), Document("", "yes", "d"))


# Reading order


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 999), min_size=1, max_size=70),
    st.integers(0, 60),
    st.integers(1, 9),
    st.integers(0, 9),
)
def test_documents_are_read_equally_often(lengths: list[int], steps: int, batch_size: int, seed: int) -> None:
    batches = reading_order(lengths, steps, batch_size, seed)
    assert [len(batch) for batch in batches] == [batch_size] * steps
    counts = Counter(index for batch in batches for index in batch)
    seen = [counts[index] for index in range(len(lengths))]
    assert max(seen) - min(seen) <= 1
    assert batches == reading_order(lengths, steps, batch_size, seed)


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=40),
    st.integers(0, 60),
    st.integers(1, 9),
    st.integers(0, 9),
)
def test_some_documents_are_read_in_every_few_epochs_only(
    every: list[int], steps: int, batch_size: int, seed: int
) -> None:
    every[0] = 1
    batches = reading_order([1] * len(every), steps, batch_size, seed, every)
    assert [len(batch) for batch in batches] == [batch_size] * steps
    counts = Counter(index for batch in batches for index in batch)
    epochs = counts[0]
    assert all(
        epochs // period - 1 <= counts[index] <= epochs // period + 1 for index, period in enumerate(every)
    )


def test_batches_hold_similar_lengths_in_random_order() -> None:
    lengths = np.random.default_rng(0).integers(1, 1000, 512).tolist()
    batches = reading_order(lengths, 64, 8, 0)
    assert np.mean([np.ptp([lengths[index] for index in batch]) for batch in batches]) < 150
    means = [np.mean([lengths[index] for index in batch]) for batch in batches]
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.5
    assert batches != reading_order(lengths, 64, 8, 1)


def test_nothing_to_read_is_an_error() -> None:
    with pytest.raises(InputError, match="no documents"):
        reading_order([], 1, 1, 0)


# Overlap


def test_overlap_counts_verbatim_runs_of_words() -> None:
    text = " ".join(f"w{n}" for n in range(20))
    documents = [Document("", text, "d")]
    assert overlap(documents, [Document("so it is: " + text, " and on", "d")]) == 1.0
    assert overlap(documents, [Document("", text.replace("w10 ", ""), "d")]) == 0.0
    # 8 runs of 13 words; w0 to w13 hold two of them.
    assert overlap(documents, [Document("", " ".join(text.split()[:14]), "d")]) == 2 / 8
    assert overlap([Document("", "a short one", "d")], [Document("", "not a  short one here", "d")]) == 1.0
    assert overlap([Document("", "a short one", "d")], [Document("", "a short-one", "d")]) == 0.0
    assert overlap([], documents) == 0.0


@given(st.integers(1, 500), st.floats(0.1, 20), st.integers(1, 300), st.integers(1, 16))
def test_a_cap_on_passes_caps_the_steps(steps, epochs, documents, batch_size):
    assert training_steps(steps, None, documents, batch_size) == steps
    capped = training_steps(steps, epochs, documents, batch_size)
    assert 1 <= capped <= steps
    assert capped == 1 or capped * batch_size <= epochs * documents + batch_size
