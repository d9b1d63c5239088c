"""Metrics against naive references, on every device architecture and on a Mixture-of-Experts."""

from __future__ import annotations

import copy
import math
import string
from typing import Any

import pytest
import torch
from device_models import TEXT, make_model, save_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from deepfusion.errors import InputError
from deepfusion.learning.metrics import bits_per_byte_of_each, evaluate_model, expert_use
from deepfusion.models.loading import context_limit
from deepfusion.text.encoding import encode
from deepfusion.text.rows import Document, Turn, conversation
from deepfusion.text.windows import cut_windows

EXAMPLES = [
    Document("", TEXT[0], "animals"),
    Document("Question: where?\nAnswer:", " the hill", "animals"),
    Document("Count:\n", TEXT[2] + " eight", "numbers"),
    Document("", "one", "numbers"),
    Document("Question: Ω?\nAnswer:", " zwölf – ¾", "numbers"),
]
QUESTIONS = [
    Document(
        f"Question: {text[:8]}\nAnswer:",
        f" {answer}",
        "quiz",
        (" cat", " seven hills", " x", " far away"),
        index,
    )
    for text, (index, answer) in zip(TEXT, [(0, "cat"), (1, "seven hills"), (3, "far away")], strict=True)
]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def silent() -> PreTrainedModel:
    """A model that gives every token the same probability."""
    model = make_model("gpt2")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


def moe(experts: int = 4) -> PreTrainedModel:
    torch.manual_seed(1)
    config = Qwen3MoeConfig(
        vocab_size=288, hidden_size=16, intermediate_size=16, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8, num_experts=experts, num_experts_per_tok=2,
        max_position_embeddings=128,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config).eval()


def naive(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, document: Document
) -> tuple[float, int, int]:
    """Nats, tokens and correct tokens of a completion, one sequence at a time, token by token."""
    encoded = encode(tokenizer, document, add_end=False)
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(encoded.input_ids)[None]).logits[0].double()
    nats, tokens, correct = 0.0, 0, 0
    for place in range(1, len(encoded.input_ids)):
        if encoded.offsets[place][1] > len(document.prompt):
            token = int(encoded.input_ids[place])
            nats -= float(logits[place - 1].log_softmax(-1)[token])
            correct += int(logits[place - 1].argmax()) == token
            tokens += 1
    return nats, tokens, correct


@pytest.mark.parametrize("kind", ["gpt2", "llama", "olmo", "bloom", "moe"])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_agrees_with_a_naive_reference(
    kind: str, batch_size: int, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = moe() if kind == "moe" else make_model(kind).eval()
    found = evaluate_model(model, tokenizer, EXAMPLES, batch_size=batch_size)
    references = [naive(model, tokenizer, document) for document in EXAMPLES]
    nats, tokens, correct = (sum(values) for values in zip(*references, strict=True))
    assert found["tokens"] == tokens
    assert found["examples"] == len(EXAMPLES)
    assert found["log_perplexity"] == pytest.approx(nats / tokens, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert found["token_accuracy"] == correct / tokens
    size = sum(len(document.completion.encode()) for document in EXAMPLES)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert found["choice_accuracy"] is None
    of_numbers = [r for r, e in zip(references, EXAMPLES, strict=True) if e.domain == "numbers"]
    expected = sum(r[0] for r in of_numbers) / sum(r[1] for r in of_numbers)
    assert found["by_domain"]["numbers"]["log_perplexity"] == pytest.approx(expected, rel=1e-5)
    each = [values["log_perplexity"] for values in found["by_domain"].values()]
    assert found["mean_over_domains"]["log_perplexity"] == pytest.approx(sum(each) / 2)


def test_every_turn_of_the_assistant_counts_in_the_words_of_the_models_own_template(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = make_model("llama").eval()
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}{% endfor %}"
    )
    turns = [
        Turn("user", "one"),
        Turn("assistant", "two three", True),
        Turn("user", "four"),
        Turn("assistant", "zwölf", True),
    ]
    document = conversation(turns, "d")
    found = {}
    for reader, text in (
        (chatty, "[user]one<end>[assistant]two three<end>[user]four<end>[assistant]zwölf"),
        (tokenizer, None),
    ):
        found[text is None] = evaluate_model(model, reader, [document])
        whole = text or document.text
        ids = reader(whole, add_special_tokens=False, return_offsets_mapping=True)
        start = [] if text else [reader.eos_token_id]
        with torch.no_grad():
            logits = (
                model(input_ids=torch.tensor([[*start, *ids.input_ids]])).logits[0].double().log_softmax(-1)
            )
        space = 0 if text else 1  # in plain words the space before an answer is a part of it
        spans = [(whole.index(t) - space, whole.index(t) + len(t)) for t in ("two three", "zwölf")]
        nats, tokens = 0.0, 0
        for place, (token, (begin, end)) in enumerate(
            zip(ids.input_ids, ids.offset_mapping, strict=True), len(start)
        ):
            if any(end > a and begin < b for a, b in spans):
                nats, tokens = nats - float(logits[place - 1, token]), tokens + 1
        assert found[text is None]["tokens"] == tokens
        assert found[text is None]["log_perplexity"] == pytest.approx(nats / tokens, rel=1e-5)
        size = len(" two three zwölf".encode())
        assert found[text is None]["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert found[False]["bits_per_byte"] != found[True]["bits_per_byte"]


def test_choice_is_the_likeliest_option_per_byte(tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_model("llama", seed=5).eval()
    right = 0
    for document in QUESTIONS:
        scores = [
            -naive(model, tokenizer, Document(document.prompt, option, "quiz"))[0] / len(option.encode())
            for option in document.options
        ]
        right += scores.index(max(scores)) == document.answer
    found = evaluate_model(model, tokenizer, [*EXAMPLES, *QUESTIONS], batch_size=5)
    assert found["choice_accuracy"] == right / len(QUESTIONS)
    assert found["by_domain"]["animals"]["choice_accuracy"] is None
    without = evaluate_model(model, tokenizer, QUESTIONS, choices=False)
    assert without["choice_accuracy"] is None
    assert without["log_perplexity"] == pytest.approx(found["by_domain"]["quiz"]["log_perplexity"], rel=1e-5)


def test_ties_choose_the_first_option(silent: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    options = (" Q", " Z", " X")
    documents = [Document("Which?", options[answer], "quiz", options, answer) for answer in (0, 1, 2, 0)]
    assert evaluate_model(silent, tokenizer, documents)["choice_accuracy"] == 0.5


@settings(max_examples=50, deadline=None)
@given(texts=st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=5), batch_size=st.integers(1, 4))
def test_uniform_model_scores_the_logarithm_of_its_vocabulary(
    silent: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, texts: list[str], batch_size: int
) -> None:
    documents = [Document("", text, f"domain {i % 2}") for i, text in enumerate(texts)]
    found = evaluate_model(silent, tokenizer, documents, batch_size=batch_size)
    tokens = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
    assert found["tokens"] == tokens == sum(values["tokens"] for values in found["by_domain"].values())
    assert found["log_perplexity"] == pytest.approx(math.log(288))
    size = sum(len(text.encode()) for text in texts)
    assert found["bits_per_byte"] == pytest.approx(tokens * math.log2(288) / size)


@settings(max_examples=30, deadline=None)
@given(
    completion=st.text(alphabet=string.ascii_letters + " Ω\n", min_size=1, max_size=700),
    prompt=st.text(alphabet="ab ", max_size=300),
    max_chars=st.sampled_from([64, 100, 1024]),
)
def test_long_texts_are_measured_whole_within_the_context(
    silent: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, completion: str, prompt: str, max_chars: int
) -> None:
    # This model fails on more than 64 tokens.
    assert context_limit(silent) == 64
    found = evaluate_model(silent, tokenizer, [Document(prompt, completion, "long")], max_chars=max_chars)
    assert found["examples"] == 1
    nats = found["tokens"] * math.log(288)
    # The denominator is the whole completion: nothing of it was left out.
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(completion.encode()))
    assert found["tokens"] >= len(tokenizer(completion, add_special_tokens=False)["input_ids"]) - 1


def test_bits_per_byte_of_each_document(tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_model("gpt2").eval()
    found = bits_per_byte_of_each(model, tokenizer, EXAMPLES)
    alone = [evaluate_model(model, tokenizer, [document])["bits_per_byte"] for document in EXAMPLES]
    assert found == pytest.approx(alone, rel=1e-5)


def test_model_is_left_as_it_was(tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_model("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5).train()
    first, second = (evaluate_model(model, tokenizer, EXAMPLES)["log_perplexity"] for _ in range(2))
    assert model.training
    assert first == second


def test_expert_use_counts_the_choices_of_real_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    model = moe()
    found = expert_use(model, tokenizer, EXAMPLES, batch_size=2)
    assert list(found) == ["animals", "numbers"]
    for layers in found.values():
        assert [len(layer) for layer in layers] == [4, 4]
        assert [sum(layer) for layer in layers] == pytest.approx([1, 1])
    alone = expert_use(model, tokenizer, EXAMPLES, batch_size=1)
    assert found["numbers"][1] == pytest.approx(alone["numbers"][1], abs=1e-6)


def test_expert_use_shows_a_router_that_always_chooses_the_same(tokenizer: PreTrainedTokenizerFast) -> None:
    model = moe()
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight.zero_()
        # All tokens share a large first coordinate, which only these experts want.
        model.model.embed_tokens.weight[:, 0] = 50.0
        model.model.layers[1].mlp.gate.weight[2, 0] = model.model.layers[1].mlp.gate.weight[3, 0] = 1.0
    for layers in expert_use(model, tokenizer, EXAMPLES).values():
        assert layers[1] == pytest.approx([0, 0, 0.5, 0.5])


@pytest.mark.parametrize(
    "bad", [{"max_chars": 0}, {"max_chars": -5}, {"batch_size": 0}, {"batch_size": -1}, {"max_chars": 1.5}]
)
def test_numbers_without_sense_end_at_once(
    bad: dict[str, Any], silent: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    for measure in (evaluate_model, expert_use):
        with pytest.raises(InputError, match=next(iter(bad))):
            measure(silent, tokenizer, EXAMPLES, **bad)
    if "batch_size" in bad:
        with pytest.raises(InputError, match="batch_size"):
            bits_per_byte_of_each(silent, tokenizer, EXAMPLES, **bad)
    with pytest.raises(InputError, match="max_chars"):
        cut_windows(EXAMPLES[0], min(int(bad.get("max_chars", 0)), 0))


def test_the_mean_over_domains_counts_each_domain_once(tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_model("llama", seed=5).eval()
    found = evaluate_model(model, tokenizer, [*EXAMPLES, *QUESTIONS, Document("", TEXT[1] * 3, "long")])
    rows = found["by_domain"]
    for key in ("log_perplexity", "bits_per_byte", "token_accuracy"):
        assert found["mean_over_domains"][key] == pytest.approx(
            sum(row[key] for row in rows.values()) / len(rows)
        )
    assert found["mean_over_domains"]["bits_per_byte"] != pytest.approx(found["bits_per_byte"], rel=1e-3)
    assert (
        found["mean_over_domains"]["choice_accuracy"] == rows["quiz"]["choice_accuracy"]
    )  # the only domain with options


def test_bad_input_is_named(tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_model("gpt2")
    for measure in (evaluate_model, expert_use):
        with pytest.raises(InputError) as error:
            measure(model, tokenizer, [])
        assert error.value.code == "no-examples"
    with pytest.raises(InputError) as error:
        expert_use(model, tokenizer, EXAMPLES)
    assert error.value.code == "no-routers"
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(math.nan)
    with pytest.raises(InputError) as error:
        evaluate_model(model, tokenizer, EXAMPLES)
    assert error.value.code == "non-finite-loss"
