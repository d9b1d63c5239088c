from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from device_models import save_checkpoint

from deepfusion.models.loading import load_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = (
        tmp_path_factory.mktemp("generation") / "gpt2"
    )  # learned positions: a token beyond the context is an IndexError
    save_checkpoint(folder, "gpt2")
    return folder


def tokens(folder: Path, text: str) -> int:
    return len(load_tokenizer(folder)(text).input_ids)


def test_what_fits_is_generated_and_is_the_same_each_time(model: Path, invoke: Callable[..., Any]) -> None:
    first, second = (
        json.loads(invoke("generate", model, "the cat", "--max-new-tokens", 7, "--json").out)
        for _ in range(2)
    )
    assert first == second
    assert first["prompt"] == "the cat"
    assert 1 <= first["tokens"] <= 7


@pytest.mark.parametrize("prompt", ["", " ", "猫 🐈", "<end>"])
def test_any_text_is_a_prompt(prompt: str, model: Path, invoke: Callable[..., Any]) -> None:
    done = invoke("generate", model, prompt, "--max-new-tokens", 3, "--temperature", 1, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["prompt"] == prompt


def test_the_context_ends_the_answer_and_a_line_says_so(model: Path, invoke: Callable[..., Any]) -> None:
    prompt = "the cat sat on the mat " * 5
    room = 64 - 1 - tokens(model, prompt)
    assert 0 < room < 50
    done = invoke("generate", model, prompt, "--max-new-tokens", 1000, "--json")
    assert done.code == 0, done.err
    assert f"the context of 64 tokens leaves room for {room} of 1000 new ones" in done.err
    assert json.loads(done.out)["tokens"] <= room


@pytest.mark.parametrize("words", [12, 5000])
def test_a_prompt_beyond_the_context_is_refused_in_one_line(
    words: int, model: Path, invoke: Callable[..., Any]
) -> None:
    done = invoke("generate", model, "the cat sat on the mat " * words)
    assert (done.code, done.out) == (2, "")
    assert "the context of the model 64" in done.err.splitlines()[-1]
    assert done.err.splitlines()[-1].endswith("[long-prompt]")


def test_a_prompt_that_is_no_text_is_refused_in_one_line(model: Path, invoke: Callable[..., Any]) -> None:
    done = invoke("generate", model, "\udcff")
    assert (done.code, done.out) == (2, "")
    assert done.err.splitlines()[-1].endswith("[bad-text]")


def test_a_tokenizer_without_an_end_is_refused_in_one_line(
    tmp_path: Path, invoke: Callable[..., Any]
) -> None:
    save_checkpoint(tmp_path, "bloom")
    path = tmp_path / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(
        json.dumps({k: v for k, v in settings.items() if k not in ("eos_token", "bos_token", "pad_token")})
    )
    done = invoke("generate", tmp_path, "the cat")
    assert (done.code, done.out) == (2, "")
    assert done.err.splitlines()[-1].endswith("no end-of-text token [bad-tokenizer]")
