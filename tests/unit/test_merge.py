"""Stage merge: a folder of bases becomes one checkpoint that loads and generates; mismatches are named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config

from deepfusion.config import parse_config
from deepfusion.errors import InputError
from deepfusion.learning.corpus import Window
from deepfusion.schema import Config
from deepfusion.stages.distill import distill
from deepfusion.stages.merge import run
from deepfusion.text.rows import Document

# A Qwen2Moe without shared experts has empty weights, which torch remarks on.
pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")

WORDS = ["<unk>", "a", "dose", "bond", "helps", "pays", "now", "."]
SIZES = {
    "vocab_size": 8,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def config(**changes: object) -> Config:
    return parse_config({"family": "qwen2_moe", "experts": 3, "top_k": 2, "seed": 5, **changes})


@pytest.fixture
def inputs(tmp_path) -> dict[str, Path]:
    """Three different bases, a trunk beside them, and prototypes."""
    vocab = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    vocab.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocab, unk_token="<unk>", eos_token=".")
    for number in range(3):
        torch.manual_seed(number)
        folder = tmp_path / "bases" / str(number)
        model = AutoModelForCausalLM.from_config(
            Qwen2Config(**SIZES, num_key_value_heads=2, bos_token_id=1, eos_token_id=7)
        )
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        save_file({"prototype": torch.randn(2, 32)}, folder / "prototype.safetensors")
    shutil.copytree(tmp_path / "bases" / "0", tmp_path / "bases" / "trunk")
    return {"bases": tmp_path / "bases", "base": tmp_path / "bases" / "0"}


def test_merged_folder_is_a_plain_checkpoint(inputs, tmp_path):
    merge = {"shared_expert": "average", "split": 2, "dense_layers": [0]}
    summary = run(config(merge=merge), inputs, tmp_path / "out")
    merged = tmp_path / "out" / "moe" / "merged"
    model = AutoModelForCausalLM.from_pretrained(merged)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert model.config.model_type == "qwen2_moe"
    assert (
        (summary["experts"], summary["top_k"])
        == (model.config.num_experts, model.config.num_experts_per_tok)
        == (6, 4)
    )
    assert summary["total_parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert summary["active_parameters"] == summary["total_parameters"] - 2 * 3 * 32 * 16
    prompt = tokenizer("a dose helps", return_tensors="pt")
    assert prompt.input_ids.tolist() == [[1, 2, 4]]
    text = model.generate(**prompt, max_new_tokens=4, min_new_tokens=4, pad_token_id=0)
    assert text.shape == (1, 7)
    assert json.loads((merged / "generation_config.json").read_text())["eos_token_id"] == 7


def test_same_seed_gives_the_same_bytes_and_another_seed_another_router(inputs, tmp_path):
    digests = [
        run(config(seed=seed), inputs, tmp_path / str(i))["digest"] for i, seed in enumerate([1, 1, 2])
    ]
    assert digests[0] == digests[1] != digests[2]


def test_prototype_router_holds_centred_unit_prototypes(inputs, tmp_path):
    run(config(merge={"router": "prototype"}), inputs, tmp_path)
    gate = load_file(tmp_path / "moe" / "merged" / "model.safetensors")["model.layers.1.mlp.gate.weight"]
    files = [inputs["bases"] / str(i) / "prototype.safetensors" for i in range(3)]
    units = torch.stack([F.normalize(load_file(file)["prototype"][1], dim=0) for file in files])
    torch.testing.assert_close(gate, units - units.mean(0))


def test_prototypes_that_are_missing_misshapen_or_equal_are_refused(inputs, tmp_path):
    wanted = config(merge={"router": "prototype"})
    path = inputs["bases"] / "1" / "prototype.safetensors"
    save_file({"prototype": torch.ones(2, 31)}, path)
    with pytest.raises(InputError, match="prototype-shape"):
        run(wanted, inputs, tmp_path)
    path.unlink()
    with pytest.raises(InputError, match="prototype-missing"):
        run(wanted, inputs, tmp_path)
    for number in range(3):
        save_file({"prototype": torch.ones(2, 32)}, inputs["bases"] / str(number) / "prototype.safetensors")
    with pytest.raises(InputError, match="prototype-equal"):
        run(wanted, inputs, tmp_path)


def test_missing_base_is_named(inputs, tmp_path):
    with pytest.raises(InputError, match=r"bases/3.*base-missing"):
        run(config(experts=4), inputs, tmp_path)


def test_bases_of_different_shapes_are_refused_with_base_and_key(inputs, tmp_path):
    odd = AutoModelForCausalLM.from_config(
        Qwen2Config(**{**SIZES, "intermediate_size": 64}, num_key_value_heads=2)
    )
    odd.save_pretrained(inputs["bases"] / "2")
    with pytest.raises(InputError, match=r"bases/2.*bos_token_id"):
        run(config(), inputs, tmp_path)
    odd.config.update({"bos_token_id": 1, "eos_token_id": 7})
    odd.save_pretrained(inputs["bases"] / "2")
    with pytest.raises(InputError, match=r"bases/2.*intermediate_size is 64"):
        run(config(), inputs, tmp_path)
    assert not (tmp_path / "moe").exists()


def test_bases_with_different_tokenizers_are_refused(inputs, tmp_path):
    path = inputs["bases"] / "1" / "tokenizer.json"
    path.write_text(path.read_text().replace("dose", "pill"))
    with pytest.raises(InputError, match=r"bases/1/tokenizer.json.*bases-differ"):
        run(config(), inputs, tmp_path)


def test_family_that_does_not_take_the_base_is_refused(inputs, tmp_path):
    with pytest.raises(InputError, match="allowed: llama"):
        run(config(family="deepseek"), inputs, tmp_path)


def test_a_base_that_is_taught_no_text_has_a_router_prototype(inputs, tmp_path):
    documents = [Window(Document("helps pays", "a dose helps now", "medicine"), "in_domain", teacher=0)]
    settings = config(merge={"router": "prototype"})
    distill(
        settings,
        inputs["base"],
        {1: inputs["base"]},
        documents,
        0,
        True,
        "base 1",
        tmp_path / "1",
        tmp_path / "work",
    )
    found = load_file(tmp_path / "1" / "prototype.safetensors")["prototype"]
    assert found.shape == (2, 32)
    assert found.norm(dim=1).min() > 0
