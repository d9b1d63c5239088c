"""What rows begin with alike is read once, and scores the same as if each were read by itself."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from device_models import make_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from deepfusion.families import base as families
from deepfusion.learning.scoring import LEAST_SHARED, Row, score
from deepfusion.models.loading import load_model
from deepfusion.models.presets import resolve

VOCAB = 280


def question(start: int, prompt: int, *options: int, seed: int = 0) -> list[Row]:
    """Rows of one prompt of `prompt` tokens and options of so many."""
    g = np.random.default_rng(seed)
    begin = g.integers(3, VOCAB, prompt)
    rows = [np.concatenate([[start], begin, g.integers(3, VOCAB, size)]) for size in options]
    return [Row(ids, np.arange(len(ids)) > prompt) for ids in rows]


def groups() -> list[list[Row]]:
    sizes = [(30, 3, 9, 1, 4), (12, 5, 5, 5, 5), (2, 3, 4), (25, 2, 1, 6, 8), (40, 7), (11, 2, 2)]
    return [question(1, *size, seed=seed) for seed, size in enumerate(sizes)]


def check(model: PreTrainedModel, batch_size: int = 5) -> None:
    together, apart = groups(), groups()
    score(model, together, batch_size)
    score(model, [[row] for group in apart for row in group], 1)
    for ours, theirs in zip(together, apart, strict=True):
        assert [row.nats for row in ours] == pytest.approx([row.nats for row in theirs], rel=1e-4)
        assert [row.correct for row in ours] == [row.correct for row in theirs]


def naive(model: PreTrainedModel, row: Row) -> float:
    with torch.no_grad():
        log_p = model(torch.from_numpy(row.input_ids)[None]).logits[0].log_softmax(-1)
    at = np.flatnonzero(row.counted)
    return -float(log_p[at - 1, row.input_ids[at]].double().sum())


@pytest.mark.parametrize("batch_size", [1, 5, 64])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "olmo", "bloom"])
def test_a_shared_beginning_changes_no_score(kind: str, batch_size: int) -> None:
    model = make_model(kind).eval()
    check(model, batch_size)
    scored = groups()
    score(model, scored, batch_size)
    for row in (row for group in scored for row in group):
        assert row.nats == pytest.approx(naive(model, row), rel=1e-4)


@pytest.mark.parametrize("family", families.names())
def test_bases_of_every_family_go_on_from_what_they_have_read(family: str) -> None:
    check(load_model(resolve(families.get(family).tiny_base)))


@pytest.mark.parametrize("window", [6, 1000])
def test_a_model_that_sees_only_the_last_tokens_is_read_row_by_row(window: int) -> None:
    config = AutoConfig.for_model(
        "mistral", hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=VOCAB, sliding_window=window,
    )  # fmt: skip
    torch.manual_seed(0)
    check(AutoModelForCausalLM.from_config(config).eval())


def test_a_model_with_another_memory_is_read_row_by_row() -> None:
    config = AutoConfig.for_model(
        "mamba", hidden_size=16, num_hidden_layers=2, state_size=4, vocab_size=VOCAB
    )
    torch.manual_seed(0)
    check(AutoModelForCausalLM.from_config(config).eval())


def tokens_read(model: PreTrainedModel, rows: Sequence[Sequence[Row]]) -> int:
    read = []
    hook = model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    score(model, rows, 64)
    hook.remove()
    return sum(read)


def test_a_prompt_is_read_once_and_no_last_token_at_all() -> None:
    model = make_model("llama").eval()
    asked = question(1, 30, 4, 4, 4, 4)
    assert tokens_read(model, [asked]) == 30 + 4 * 4
    assert tokens_read(model, [[row] for row in asked]) == 4 * (31 + 4 - 1)


def test_short_beginnings_and_rows_without_anything_to_count() -> None:
    model = make_model("llama").eval()
    asked = question(1, LEAST_SHARED - 2, 3, 3)
    assert tokens_read(model, [asked]) == 2 * (LEAST_SHARED - 1 + 3 - 1)
    nothing = Row(np.array([1, 5, 6]), np.zeros(3, bool))
    score(model, [[nothing], []], 4)
    assert (nothing.nats, nothing.correct) == (0.0, 0)
    model.train()
    score(model, [asked], 4)
    assert model.training
