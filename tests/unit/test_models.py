from __future__ import annotations

import json
import multiprocessing
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from device_models import DIMENSIONS, make_model, save_checkpoint, save_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from deepfusion.digests import folder_digest
from deepfusion.errors import InputError
from deepfusion.learning import memory
from deepfusion.learning.memory import estimate_training_bytes, parse_memory, plan_training
from deepfusion.models.architecture import architecture, parameter_total, read_config
from deepfusion.models.deepen import deepen
from deepfusion.models.loading import hardware_precision, load_model, load_tokenizer, resolve_precision
from deepfusion.models.presets import LORA_TARGETS, METHODS, model_config, resolve
from deepfusion.models.signature import type_signature

SIZES = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "tinyllama": 1_100_048_384,
    "olmo-1b": 1_176_764_416,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "gpt2"
    save_checkpoint(folder)
    return folder


def test_presets_have_the_published_sizes_without_a_network() -> None:
    for name, size in SIZES.items():
        assert parameter_total(model_config(name)) == size
    assert parameter_total(model_config("bloom-1b1")) == 1_065_314_304


@pytest.mark.parametrize("kind", DIMENSIONS)
def test_the_architecture_names_what_save_pretrained_writes(kind: str, tmp_path: Path) -> None:
    from deepfusion.models.checkpoints import TensorReader

    save_checkpoint(tmp_path, kind)
    known = architecture(read_config(tmp_path))
    stored = TensorReader(tmp_path)
    assert {name: stored.shape(name) for name in stored.names()} == known.tensors
    assert set(known.tied.values()) <= set(known.tensors)


def test_the_larger_gpt2_starts_as_the_smaller_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    small, large = load_model("tiny-gpt2"), load_model("tiny-gpt2-medium")
    assert large.config.n_layer == 2 * small.config.n_layer
    ids = torch.randint(0, small.config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))
    assert torch.equal(small(ids).logits, large(ids).logits)
    folder = Path(resolve("tiny-gpt2-medium"))
    assert tmp_path in folder.parents
    again = deepen(Path(resolve("tiny-gpt2")), tmp_path / "again")
    assert folder_digest(folder) == folder_digest(again)
    large(ids, labels=ids).loss.backward()
    new = dict(large.named_parameters())["transformer.h.1.mlp.c_proj.weight"]
    assert not new.any()
    assert new.grad is not None
    assert new.grad.abs().max() > 0


def test_a_model_loads_in_either_precision(checkpoint: Path) -> None:
    model = load_model(checkpoint)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.dtype for p in load_model(checkpoint, "bf16").parameters()} == {torch.bfloat16}
    assert not model.training
    assert torch.equal(model.lm_head.weight, make_model().lm_head.weight)


def test_a_model_that_cannot_be_loaded_is_the_users_error(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="tiny-gpt2"):
        load_model(tmp_path / "nothing")
    broken = Path(shutil.copytree(checkpoint, tmp_path / "broken"))
    (broken / "model.safetensors").write_bytes(b"xx")
    with pytest.raises(InputError, match="weights-damaged"):
        load_model(broken)
    (broken / "config.json").write_text("{]")
    with pytest.raises(InputError, match="bad-config"):
        read_config(broken)


def test_missing_tensors_are_an_error_not_random_numbers(checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(checkpoint, tmp_path / "m"))
    tensors = load_file(folder / "model.safetensors")
    del tensors["transformer.h.1.mlp.c_fc.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="c_fc"):
        load_model(folder)


def test_a_tokenizer_without_padding_gets_one(checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "t"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_tokenizer(folder).pad_token == "<end>"
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="bad-tokenizer"):
        load_tokenizer(folder)


def test_a_hub_name_that_cannot_be_fetched_names_the_local_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="local folder"):
        resolve("deepfusion-test/no-such-model")


def test_precision() -> None:
    narrow, wide = model_config("tiny-gpt2"), model_config("tinyllama")
    assert [resolve_precision(asked, narrow) for asked in ("fp32", "bf16")] == ["fp32", "bf16"]
    assert resolve_precision("auto", wide) == hardware_precision()
    if not torch.cuda.is_available():
        assert resolve_precision("auto", narrow) == "fp32"


def test_a_model_is_loaded_in_the_precision_asked_for() -> None:
    kinds = {asked: load_model("tiny-gpt2", asked).dtype for asked in ("fp32", "bf16", "auto")}
    assert (kinds["fp32"], kinds["bf16"]) == (torch.float32, torch.bfloat16)
    assert kinds["auto"] == kinds[resolve_precision("auto", model_config("tiny-gpt2"))]


# Signatures.


def test_the_weights_do_not_change_the_signature_and_all_else_does(checkpoint: Path, tmp_path: Path) -> None:
    same = tmp_path / "same"
    save_checkpoint(same, seed=5)
    signature = type_signature(checkpoint, "base")
    assert type_signature(same, "base") == signature
    assert type_signature(same, "other base") != signature
    for number, changes in enumerate([{"n_head": 4}, {"n_layer": 1}, {"layer_norm_epsilon": 1e-3}]):
        other = tmp_path / str(number)
        make_model().config.__class__(**{**make_model().config.to_dict(), **changes}).save_pretrained(other)
        save_tokenizer(other)
        assert type_signature(other, "base") != signature
    save_tokenizer(same, vocab=270)
    assert type_signature(same, "base") != signature


def test_bookkeeping_does_not_change_the_signature(checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "x"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"transformers_version": "5.0", "use_cache": False, "resid_pdrop": 0.3, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["truncation"] = {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, indent=7))
    assert type_signature(folder, "b") == type_signature(checkpoint, "b")


# Memory.


@pytest.mark.parametrize(
    ("text", "size"),
    [("4GB", 4 * 10**9), ("512MiB", 2**29), ("1.5 GiB", 3 * 2**29), ("1000", 1000), (7, 7), ("2k", 2000)],
)
def test_memory_is_read(text: str | int, size: int) -> None:
    assert parse_memory(text) == size


@given(st.text(max_size=12).filter(lambda text: not any(character.isdigit() for character in text)))
def test_what_is_no_memory_is_the_users_error(text: str) -> None:
    with pytest.raises(InputError, match="bad-memory"):
        parse_memory(text)


def test_the_plan_is_ordered_and_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "is_cached", lambda hub: True)
    everything = plan_training(10**12, ["gpt2", "gpt2-medium"])
    assert [(e["type"], e["method"]) for e in everything["fits"]] == [
        (type, method) for type in ("gpt2-medium", "gpt2") for method in METHODS
    ]
    assert everything["chosen"] == everything["fits"][0]
    budget = everything["fits"][2]["estimated_bytes"]
    smaller = plan_training(budget, ["gpt2", "gpt2-medium"])
    assert smaller["chosen"] == everything["fits"][2]
    assert all(entry["estimated_bytes"] <= budget for entry in smaller["fits"])
    assert plan_training(10**6, ["gpt2"]) == {"budget_bytes": 10**6, "fits": [], "chosen": None}


def test_the_plan_says_what_is_missing_and_chooses_what_is_at_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    found = plan_training(10**12, ["gpt2", "tiny-gpt2"], methods=["full", "lora"])
    assert [(row["type"], row["available"], row["needs"]) for row in found["fits"]] == [
        *[("gpt2", False, "download of openai-community/gpt2")] * 2,
        *[("tiny-gpt2", True, "")] * 2,
    ]
    assert found["chosen"] == found["fits"][2]
    assert plan_training(10**12, ["gpt2"])["chosen"]["needs"].startswith("download of openai-community/gpt2")


def test_the_estimate_grows_with_the_work_and_spares_the_config() -> None:
    config = model_config("gpt2")
    before = config.to_dict()
    usual = estimate_training_bytes(config, "full", 4, 128)
    assert estimate_training_bytes(config, "full", 8, 128) > usual
    assert estimate_training_bytes(config, "full", 4, 256) > usual
    assert estimate_training_bytes(config, "lora", 4, 128) < usual
    assert estimate_training_bytes(config, "qlora", 4, 128) < estimate_training_bytes(config, "lora", 4, 128)
    assert estimate_training_bytes(config, "full", 4, 128, "bf16") < usual
    assert config.to_dict() == before


def test_the_estimate_knows_the_experts_of_an_moe() -> None:
    def estimate(method: str, **changes: int) -> int:
        config = AutoConfig.for_model("qwen2_moe", **SMALL, **(TRAINED["qwen2_moe"] | changes))
        return estimate_training_bytes(config, method, 4, 128, lora_rank=1)

    expert = 3 * 96 * 256  # gate, up and down projection
    assert estimate("full", num_experts=9) - estimate("full") >= 3 * 16 * expert
    assert estimate("full", num_experts_per_tok=4) > estimate("full")
    quantised = estimate("qlora", num_experts=9) - estimate("qlora")
    assert 3 * expert / 2 < quantised < 3 * 4 * expert
    assert estimate("qlora") < estimate("lora") < estimate("full")


SMALL = {"vocab_size": 2560, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
TRAINED: dict[str, dict[str, Any]] = {
    "gpt2": {
        "n_embd": 96,
        "n_layer": 3,
        "n_head": 4,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    "llama": {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 256},
    "bloom": {"hidden_size": 96, "n_layer": 3, "n_head": 4},
    "qwen2_moe": {
        "hidden_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }
    | {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 256,
        "shared_expert_intermediate_size": 256,
    },
}


class _Student(torch.nn.Module):
    def __init__(self, model: torch.nn.Module, head: torch.nn.Module, trunk: torch.nn.Module) -> None:
        super().__init__()
        self.model, self.head, self.trunk = model, [head], [trunk]

    def forward(self, ids: torch.Tensor) -> dict[str, Any]:
        from deepfusion.learning.losses import Projection, cross_entropy_and_kl

        hidden = self.trunk[0](input_ids=ids, use_cache=False).last_hidden_state
        positions = torch.arange(ids.numel()).view(ids.shape)[:, :-1].flatten()
        weights = torch.ones(len(positions))
        loss = cross_entropy_and_kl(
            Projection(hidden, self.head[0].weight), positions, ids[:, 1:].flatten(), weights
        )
        return {"loss": loss.loss, "tokens": ids.numel()}


def _measure(kind: str, method: str, work: str, answer: Any) -> None:
    """Train for four steps in a process of its own and tell the peak of its resident memory."""
    from deepfusion.learning.training import train

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL, **TRAINED[kind]))
    head, trunk = model.get_output_embeddings(), model.base_model
    if method == "lora":
        model = get_peft_model(model, LoraConfig(r=16, target_modules=LORA_TARGETS, task_type="CAUSAL_LM"))
    train(
        _Student(model, head, trunk), [None] * 4, lambda _: {"ids": torch.randint(1, 2560, (8, 342))}, stage="device",
        unit=kind, work=Path(work), learning_rate=1e-3, precision="fp32", seed=0, checkpoint_seconds=1000,
    )  # fmt: skip
    # Not ru_maxrss: that one remembers the process which started this one.
    status = Path("/proc/self/status").read_text()
    answer.put(1024 * int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "method"),
    [("gpt2", "full"), ("llama", "full"), ("bloom", "full"), ("gpt2", "lora"), ("qwen2_moe", "full")],
)
def test_the_estimate_is_within_a_fifth_of_the_measured_peak(kind: str, method: str, tmp_path: Path) -> None:
    config = AutoConfig.for_model(kind, **SMALL, **TRAINED[kind])
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=_measure, args=(kind, method, str(tmp_path), answer))
    process.start()
    peak = answer.get(timeout=120)
    process.join()
    estimate = estimate_training_bytes(config, method, 8, 342)
    assert 0.8 < estimate / peak < 1.2, (estimate, peak)
