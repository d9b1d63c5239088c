"""`acc` and `acc_norm` against lm-evaluation-harness: its stored figures, itself where it is installed, and its
definition.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from device_models import make_model, save_checkpoint, save_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from deepfusion.learning.choices import encode_pair, judge_choices, log_likelihoods, reading_limit
from deepfusion.learning.metrics import evaluate_model
from deepfusion.models.loading import load_model, load_tokenizer
from deepfusion.models.presets import resolve
from deepfusion.text.sources import Document, load_source

STORED = json.loads((Path(__file__).parent / "data" / "lm_eval_choices.json").read_text("utf-8"))
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "lm_eval_choices.py"


def question(row: dict[str, Any]) -> Document:
    options = tuple(f" {choice}" for choice in row["choices"])
    return Document(row["prompt"], options[row["answer"]], "quiz", options, row["answer"])


def harness(folder: Path) -> dict[str, Any]:
    spec = importlib.util.spec_from_file_location("lm_eval_choices", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.measure(folder, STORED["questions"])


def check(model: PreTrainedModel, tokenizer: Any, expected: dict[str, Any]) -> None:
    asked = [question(row) for row in STORED["questions"]]
    pairs = [[encode_pair(tokenizer, one.prompt, option) for option in one.options] for one in asked]
    found = log_likelihoods(model, pairs, 5, reading_limit(model, tokenizer))
    for ours, theirs in zip(found, expected["log_likelihoods"], strict=True):
        assert ours == pytest.approx(theirs, abs=2e-3, rel=1e-5)
    measured = evaluate_model(model, tokenizer, asked, max_chars=4096)
    for key in ("acc", "acc_norm"):
        assert measured[key] == measured["by_domain"]["quiz"][key] == measured["mean_over_domains"][key]
        assert measured[key] == pytest.approx(expected[key])


@pytest.mark.parametrize("name", sorted(STORED["models"]))
def test_equals_the_stored_figures_of_the_harness(name: str) -> None:
    folder = resolve(name)
    check(load_model(folder), load_tokenizer(folder), STORED["models"][name])


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_equals_the_harness_where_it_is_installed(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    folder = tmp_path / kind
    save_checkpoint(folder, kind, seed=3)
    check(load_model(folder), load_tokenizer(folder), harness(folder))


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@settings(max_examples=40, deadline=None)
@given(
    prompt=st.text(max_size=90),
    choices=st.lists(st.text(min_size=1, max_size=12), min_size=2, max_size=4),
    batch_size=st.integers(1, 4),
)
def test_is_the_definition(
    tokenizer: PreTrainedTokenizerFast, prompt: str, choices: list[str], batch_size: int
) -> None:
    """Whole text encoded once, cut after the tokens of the stripped prompt, one sequence at a time, without padding."""
    model = make_model("gpt2", seed=1).eval()
    scores = []
    for choice in choices:
        whole, border = tokenizer.encode(f"{prompt} {choice}"), max(len(tokenizer.encode(prompt.rstrip())), 1)
        if not prompt:
            whole = [tokenizer.eos_token_id, *whole]
        whole, count = whole[-(64 + 1) :], min(len(whole) - border, 64)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([whole[:-1]])).logits[0].double().log_softmax(-1)
        places = range(len(whole) - count, len(whole))
        scores.append(sum(float(logits[place - 1, whole[place]]) for place in places))
    plain = np.array(scores)
    norm = plain / np.array([len(choice) for choice in choices])
    options = tuple(f" {choice}" for choice in choices)
    for ranked, key in ((plain, "acc"), (norm, "acc_norm")):
        others = np.delete(ranked, ranked.argmax())
        if len(others) and ranked.max() - others.max() < 1e-3:
            continue  # rounding may decide
        best = int(ranked.argmax())
        for answer in range(len(options)):
            asked = [Document(prompt, options[answer], "quiz", options, answer)]
            assert getattr(judge_choices(model, tokenizer, asked, batch_size=batch_size)[0], key) == (
                answer == best
            )


def test_equal_options_choose_the_first(tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_model("gpt2")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    asked = [Document("Which?", " Q", "quiz", (" Q", " Z", " X"), answer) for answer in (0, 1, 2, 0)]
    assert [tuple(verdict) for verdict in judge_choices(model, tokenizer, asked, batch_size=3)] == [
        (True, True), (False, False), (False, False), (True, True),
    ]  # fmt: skip


def test_characters_of_the_choice_decide_where_bytes_would_not(tokenizer: PreTrainedTokenizerFast) -> None:
    """A model that gives every token the same probability prefers few tokens, per character or per byte."""
    model = make_model("gpt2")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    options = (" 日本", " abcd", " ab")
    asked = [Document("Which?", option, "quiz", options, place) for place, option in enumerate(options)]
    tokens = np.array([len(encode_pair(tokenizer, "Which?", option)[1]) for option in options])
    per_character = (-tokens / np.array([2, 4, 2])).argmax()
    per_byte = (-tokens / np.array([7, 5, 3])).argmax()
    assert per_character != per_byte
    found = [evaluate_model(model, tokenizer, [one]) for one in asked]
    assert [row["acc_norm"] for row in found] == [float(place == per_character) for place in range(3)]
    assert [row["choice_accuracy"] for row in found] == [float(place == per_byte) for place in range(3)]


def test_absent_without_options(tokenizer: PreTrainedTokenizerFast) -> None:
    model, plain = make_model("gpt2").eval(), Document("", "one two three", "numbers")
    found = evaluate_model(model, tokenizer, [plain])
    assert (found["acc"], found["acc_norm"], found["mean_over_domains"]["acc"]) == (None, None, None)
    mixed = evaluate_model(model, tokenizer, [plain, question(STORED["questions"][0])])
    assert mixed["by_domain"]["numbers"]["acc"] is None
    assert mixed["mean_over_domains"]["acc"] == mixed["by_domain"]["quiz"]["acc"] == mixed["acc"]


def test_questions_of_files_are_asked_as_the_harness_would(tmp_path: Path) -> None:
    row = {"question": "Which vitamin prevents scurvy?", "options": ["A", "B", "C"], "answer": "C"}
    (tmp_path / "quiz.jsonl").write_text(json.dumps(row) + "\n", "utf-8")
    document = load_source(str(tmp_path / "quiz.jsonl"))[0]
    assert not document.prompt[-1].isspace()
    assert all(option.startswith(" ") and not option.startswith("  ") for option in document.options)
