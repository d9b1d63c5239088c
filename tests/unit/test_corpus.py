"""Public text: every document finds the proxy that knows it, samples stay with theirs, files keep everything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import overlay, sentences, small_settings, write_config, write_rows
from deepfusion.config import load_config
from deepfusion.errors import InputError
from deepfusion.learning.corpus import (
    Window,
    assign_teachers,
    build_corpus,
    read_corpus,
    reading_periods,
    sample_counts,
    sample_texts,
    write_corpus,
)
from deepfusion.schema import Config
from deepfusion.text.rows import Document
from deepfusion.text.splits import make_splits


@pytest.fixture(scope="module")
def proxies(zoo, tmp_path_factory) -> list[Path]:
    """Two proxies with tokenizers of their own: one learned finance, the other cooking."""
    folders = []
    for domain, name in (("finance", "mini-gpt2"), ("cooking", "mini-llama")):
        folder = tmp_path_factory.mktemp(domain)
        model, tokenizer = (
            AutoModelForCausalLM.from_pretrained(zoo[name]),
            AutoTokenizer.from_pretrained(zoo[name]),
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        for row in sentences(domain, 60):
            ids = tokenizer(row["text"], return_tensors="pt").input_ids
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.eval().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        folders.append(folder)
    return folders


def config(zoo: dict[str, Path], folder: Path, public: list[str]) -> Config:
    values = overlay(
        small_settings(zoo, folder), data={"public": public, "sampled_documents": 5, "generic": []}
    )
    return load_config(write_config(folder / "config.yaml", values))


def test_teacher_is_the_proxy_that_knows_the_text(zoo, proxies, tmp_path):
    documents = [
        Window(Document("", row["text"], "?"), "public")
        for domain in ("finance", "cooking")
        for row in sentences(domain, 10, seed=7)
    ]
    found = assign_teachers(documents, proxies, config(zoo, tmp_path, ["in_domain"]))
    assert [document.teacher for document in found] == [0] * 10 + [1] * 10
    assert [(d.document, d.source) for d in found] == [(d.document, d.source) for d in documents]


def test_known_teachers_are_kept(zoo, proxies, tmp_path):
    cooking = Document("", sentences("cooking", 1)[0]["text"], "?")
    documents = [Window(cooking, "sampled", 0), Window(cooking, "public")]
    found = assign_teachers(documents, proxies, config(zoo, tmp_path, ["in_domain"]))
    assert [document.teacher for document in found] == [0, 1]


def test_samples_know_their_proxy_and_are_drawn_once(zoo, proxies, tmp_path):
    settings = config(zoo, tmp_path, ["sampled"])
    found = build_corpus(settings, make_splits(settings), proxies, tmp_path)
    assert {document.source for document in found} == {"sampled"}
    for number in (0, 1):
        texts = json.loads((tmp_path / f"sampled-{number}.json").read_text("utf-8"))
        own = "".join(document.document.text for document in found if document.teacher == number)
        assert len(texts) == 5
        assert own == "".join(texts)
    (tmp_path / "sampled-1.json").write_text(json.dumps(["kept from an earlier attempt"]))
    again = build_corpus(settings, make_splits(settings), proxies, tmp_path)
    assert [d.document.text for d in again if d.teacher == 1] == ["kept from an earlier attempt"]


@given(st.integers(1, 500), st.lists(st.integers(0, 1000), min_size=1, max_size=20))
def test_proxies_that_are_best_nowhere_write_no_samples(each, taught):
    counts = sample_counts(each, taught)
    asked = [count for count in counts if count]
    assert len(set(asked)) == 1
    assert abs(sum(counts) - each * len(taught)) <= len(asked) / 2
    if not any(taught):
        assert counts == [each] * len(taught)
    else:
        assert counts[taught.index(max(taught))] > 0
        assert all(
            not count
            for count, own in zip(counts, taught, strict=True)
            if 4 * len(taught) * own < sum(taught)
        )


@given(st.integers(0, 200), st.integers(1, 800), st.floats(0.05, 1))
def test_samples_are_read_no_more_often_than_their_share(real, sampled, share):
    documents = [
        Window(Document("", "text", "?"), source, 0) for source in ["public"] * real + ["sampled"] * sampled
    ]
    periods = reading_periods(documents, share)
    assert periods[:real] == [1] * real
    assert len(set(periods[real:])) == 1
    period = periods[-1]
    if not real:
        assert period == 1
    else:
        assert sampled / period <= (share + 1e-9) * (real + sampled / period)
        assert period == 1 or sampled / (period - 1) > (share - 1e-9) * (
            real + sampled / (period - 1)
        )  # and no less often


def test_samples_follow_the_seed_and_hold_what_their_proxy_knows(zoo, proxies, tmp_path, capfd):
    first, second, other = (sample_texts(proxies[0], 6, 96, seed, "fp32", "proxy 0") for seed in (1, 1, 2))
    assert "[proxy 0] sampled 6/6 texts\n" in capfd.readouterr().err
    assert first == second != other
    documents = [Window(Document("", text, "?"), "public") for text in first + other]
    found = assign_teachers(documents, proxies, config(zoo, tmp_path, ["in_domain"]))
    assert [document.teacher for document in found] == [0] * len(documents)


def test_mixture_is_cut_into_windows(zoo, proxies, tmp_path):
    long = write_rows(
        tmp_path / "long.jsonl", [{"text": " ".join(row["text"] for row in sentences("cooking", 5))}]
    )
    settings = config(zoo, tmp_path, ["in_domain", str(long), "sampled"])
    splits = make_splits(settings)
    found = build_corpus(settings, splits, proxies, tmp_path)
    assert all(len(document.document.text) <= settings.data.max_chars for document in found)
    public = "".join(document.document.text for document in found if document.source == "public")
    assert "".join(document.text for document in splits.public if not document.prompt)[:50] in public
    assert all(document.text not in public for document in splits.test)
    assert all(document.teacher in (0, 1) for document in found)


def test_no_text_at_all(zoo, proxies, tmp_path):
    settings = config(zoo, tmp_path, ["generic"])
    with pytest.raises(InputError, match="no-public-text"):
        build_corpus(settings, make_splits(settings), proxies, tmp_path)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
DOCUMENTS = st.builds(
    Window,
    st.builds(Document, TEXT, TEXT, TEXT),
    st.sampled_from(["public", "generic", "sampled"]),
    st.none() | st.integers(0, 99),
)


@given(st.lists(DOCUMENTS, max_size=5))
def test_round_trip(tmp_path_factory, documents):
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    write_corpus(documents, path)
    assert read_corpus(path) == documents
    assert [file.name for file in path.parent.iterdir()] == ["corpus.jsonl"]
