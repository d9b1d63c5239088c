"""Checkpoints in every form that people have: read as what they are, or refused in one line that names the form."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from device_models import make_model, save_checkpoint, save_tokenizer
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PreTrainedModel,
)

from deepfusion.errors import InputError
from deepfusion.models.architecture import architecture, read_config
from deepfusion.models.compact import open_whole
from deepfusion.models.loading import load_model, load_tokenizer
from deepfusion.uploads.adopt import adopt_checkpoint
from deepfusion.uploads.check import check_upload

IDS = torch.randint(1, 280, (2, 12), generator=torch.Generator().manual_seed(0))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def wide(folder: Path) -> PreTrainedModel:
    """A llama that holds more than noise, so that wrong scales would show in its logits."""
    model = save_checkpoint(folder, "llama").eval()
    torch.manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return model


def fp8(tensors: dict[str, torch.Tensor], block: int = 8) -> dict[str, torch.Tensor]:
    """Linear layers in float8 with one scale a block, as DeepSeek-V3 and Qwen3-FP8 are stored."""
    stored = {}
    for name, weight in tensors.items():
        stored[name] = weight
        if "proj" in name:
            rows, columns = weight.shape
            blocks = weight.view(rows // block, block, columns // block, block)
            scale = blocks.abs().amax((1, 3)) / 448
            stored[name] = (blocks / scale[:, None, :, None]).view(rows, columns).to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = scale
    return stored


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [8, 8], "fmt": "e4m3"}


def quantised(folder: Path, kind: str) -> PreTrainedModel:
    """A quantised checkpoint; returns the model that it was made of."""
    model = wide(folder)
    if kind == "fp8":
        edit_tensors(folder, fp8)
        edit_config(folder, quantization_config=FP8)
        return model
    pytest.importorskip("bitsandbytes")
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    how = BitsAndBytesConfig(**(four if kind == "nf4" else {"load_in_8bit": True}))
    AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=how, dtype=torch.float32
    ).save_pretrained(folder)
    return model


@pytest.mark.parametrize(("kind", "error"), [("fp8", 0.05), ("int8", 0.05), ("nf4", 0.3)])
def test_quantised_weights_are_read_with_their_scales(kind: str, error: float, tmp_path: Path) -> None:
    exact = quantised(tmp_path / "q", kind)(IDS).logits
    model = load_model(tmp_path / "q")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    difference = (model(IDS).logits - exact).std() / exact.std()
    assert 0 < difference < error
    model.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    save_tokenizer(tmp_path / "plain")
    assert torch.equal(load_model(tmp_path / "plain")(IDS).logits, model(IDS).logits)
    with pytest.raises(InputError, match=r"quantised.*plain.*\[quantised\]"):
        open_whole(tmp_path / "q")  # read tensor by tensor there is nobody to apply the scales


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_scales_without_a_word_in_the_config_are_refused(kind: str, tmp_path: Path) -> None:
    quantised(tmp_path, kind)
    edit_config(tmp_path, quantization_config=None)
    with pytest.raises(InputError, match=r"\[quantised\]"):
        load_model(tmp_path)
    edit_tensors(
        tmp_path,
        lambda tensors: {n: t.float() for n, t in tensors.items() if not n.endswith("weight_format")},
    )
    with pytest.raises(InputError, match=r"scales of quantised weights.*\[quantised\]"):
        load_model(tmp_path)


def drop_shard(folder: Path) -> None:
    shard(folder)
    shards(folder)[1].unlink()


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def shard(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(shards(folder)) > 2


def extra_shard(folder: Path) -> None:
    shard(folder)
    shutil.copy(shards(folder)[0], folder / "model-00009-of-00009.safetensors")


def both(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "whole")
    shard(folder)
    (folder / "whole").rename(folder / "model.safetensors")


def no_index(folder: Path) -> None:
    shard(folder)
    (folder / "model.safetensors.index.json").unlink()


def index_lies(folder: Path) -> None:
    shard(folder)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lost.weight"] = shards(folder)[0].name
    path.write_text(json.dumps(index))


def classifier(folder: Path) -> None:
    AutoModelForSequenceClassification.from_pretrained(folder).save_pretrained(folder)


def hidden_classifier(folder: Path) -> None:
    classifier(folder)
    edit_config(folder, architectures=None)


def gguf(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-Q4_K_M.gguf")


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def int8(folder: Path) -> None:
    edit_tensors(
        folder,
        lambda tensors: {n: (t * 100).to(torch.int8) if t.ndim == 2 else t for n, t in tensors.items()},
    )


def float8(folder: Path) -> None:
    edit_tensors(
        folder,
        lambda tensors: {n: t.to(torch.float8_e4m3fn) if t.ndim == 2 else t for n, t in tensors.items()},
    )


def nan(folder: Path) -> None:
    edit_tensors(
        folder, lambda tensors: tensors | {"lm_head.weight": tensors["lm_head.weight"] * float("nan")}
    )


def infinite(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors | {"model.norm.weight": tensors["model.norm.weight"] / 0})


def deeper(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=1)  # layers that would be left out without a word


def method(name: str) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, quantization_config={"quant_method": name, "bits": 4})


FORMS: dict[str, tuple[Callable[[Path], None], str]] = {
    "gptq": (method("gptq"), r"quantised \(gptq\).*dequantize.*\[quantised\]"),
    "awq": (method("awq"), r"quantised \(awq\).*\[quantised\]"),
    "compressed-tensors": (method("compressed-tensors"), r"compressed-tensors.*\[quantised\]"),
    "a method that nobody knows": (method("zip"), r"quantised \(zip\).*\[quantised\]"),
    "gguf": (gguf, r"GGUF.*\[weights-missing\]"),
    "int8 without scales": (int8, r"int8.*\[quantised\]"),
    "float8 without scales": (float8, r"float8.*\[quantised\]"),
    "classifier": (classifier, r"LlamaForSequenceClassification.*LlamaForCausalLM.*\[not-a-language-model\]"),
    "classifier that does not say so": (hidden_classifier, r"score\.weight.*\[bad-model\]"),
    "sentence encoder": (
        lambda folder: edit_config(folder, architectures=["LlamaModel"]),
        r"LlamaModel.*\[not-a-language-model\]",
    ),
    "adapter": (adapter, r"adapter.*\[adapter-alone\]"),
    "lost shard": (drop_shard, r"1 of \d files.*model-00002-of-.*\[weights-damaged\]"),
    "extra shard": (extra_shard, r"model-00009-of-00009.*\[weights-extra\]"),
    "two sets of weights": (both, r"beside the weights.*\[weights-extra\]"),
    "shards without index": (no_index, r"shards without.*\[weights-missing\]"),
    "index that names what is not there": (index_lies, r"lost\.weight.*\[weights-index\]"),
    "NaN": (nan, r"lm_head\.weight holds NaN.*\[non-finite\]"),
    "infinite": (infinite, r"norm\.weight holds NaN or infinite.*\[non-finite\]"),
    "more layers than the config": (deeper, r"layers\.1\..*\[bad-model\]"),
    "other widths than the config": (
        lambda folder: edit_config(folder, intermediate_size=48),
        r"proj.*48.*\[bad-model\]",
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_what_would_be_read_wrongly_is_refused_by_name(form: str, tmp_path: Path) -> None:
    make, message = FORMS[form]
    save_checkpoint(tmp_path / "model", "llama")
    make(tmp_path / "model")
    with pytest.raises(InputError, match=message):
        load_model(tmp_path / "model")


@pytest.mark.parametrize("form", FORMS)
def test_one_rule_for_every_command_that_reads_a_model(
    form: str, tmp_path: Path, invoke: Callable[..., Any]
) -> None:
    """Of the forms each command meets some, so that together they meet all; none may end in a traceback or after
    work.
    """
    folder, data = tmp_path / "model", tmp_path / "data.jsonl"
    save_checkpoint(folder, "llama")
    FORMS[form][0](folder)
    data.write_text(
        "".join(
            json.dumps({"text": f"the cat sat on mat {number} and looked around"}) + "\n"
            for number in range(40)
        )
    )
    settings = [
        "--set",
        "devices=2",
        "--set",
        f"data.private={data}",
        "--set",
        "device.types=[tiny-gpt2]",
        "--set",
        "experts=2",
    ]
    commands: list[list[Any]] = [
        ["generate", folder, "the cat"],
        ["evaluate", folder, "--data", data, "--json"],
        ["device", "train", "--data", data, "--out", tmp_path / "up", "--type", folder],
        ["config", "check", *settings, "--set", "family=deepseek", "--set", f"distill.base={folder}"],
        [
            "run",
            "--out",
            tmp_path / "run",
            *settings,
            "--set",
            "family=deepseek",
            "--set",
            f"distill.base={folder}",
        ],
    ]
    number = list(FORMS).index(form)
    for command in (commands[number % 5], commands[(number + 2) % 5]):
        done = invoke(*command)
        assert done.code == 2, done.err
        assert done.out == ""
        assert [line for line in done.err.splitlines() if line.startswith("deepfusion:")] == [
            done.err.splitlines()[-1]
        ]
        assert not (tmp_path / "up").exists()
        assert not list((tmp_path / "run").rglob("card.json"))


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_a_quantised_checkpoint_is_adopted_with_its_real_values(kind: str, tmp_path: Path) -> None:
    quantised(tmp_path / "q", kind)
    adopt_checkpoint(tmp_path / "q", tmp_path / "up", "up", np.eye(8)[0], "hashing")
    assert check_upload(tmp_path / "up", 10**9) == []
    torch.testing.assert_close(
        load_model(tmp_path / "up")(IDS).logits, load_model(tmp_path / "q")(IDS).logits
    )


def test_what_is_read_tensor_by_tensor_must_be_plain_before_any_training(
    tmp_path: Path, invoke: Callable[..., Any]
) -> None:
    """An adapter or a change refers to the public checkpoint as it is stored."""
    quantised(tmp_path / "q", "fp8")
    (tmp_path / "data.jsonl").write_text(
        "".join(json.dumps({"text": f"the cat sat on mat {n}"}) + "\n" for n in range(20))
    )
    for choice in ("method=lora", "upload=delta8"):
        done = invoke(
            "device", "train", "--data", tmp_path / "data.jsonl", "--out", tmp_path / "up", "--type", tmp_path / "q",
            "--set", f"device.{choice}",
        )  # fmt: skip
        assert done.code == 2
        assert done.err.splitlines()[-1].endswith("[quantised]")


def test_an_adapter_without_a_config_is_named_as_one(tmp_path: Path) -> None:
    adapter(tmp_path)
    with pytest.raises(InputError, match=r"an adapter, not a whole model.*fuse takes it.*\[adapter-alone\]"):
        load_model(tmp_path)


def test_what_older_versions_stored_beside_the_weights_loses_nothing(tmp_path: Path) -> None:
    for kind, extra in {
        "gpt2": {
            "transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64),
            "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
        },
        "llama": {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
    }.items():
        exact = save_checkpoint(tmp_path / kind, kind).eval()
        edit_tensors(tmp_path / kind, lambda tensors, extra=extra: tensors | extra)
        assert torch.equal(load_model(tmp_path / kind)(IDS).logits, exact(IDS).logits)
        assert set(open_whole(tmp_path / kind).names()) == set(architecture(exact.config).tensors)
        prefix = f"{exact.base_model_prefix}."
        edit_tensors(
            tmp_path / kind,
            lambda tensors, prefix=prefix: {n.removeprefix(prefix): t for n, t in tensors.items()},
        )
        assert torch.equal(load_model(tmp_path / kind)(IDS).logits, exact(IDS).logits)


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_flash_attention_of_another_machine_is_no_reason_to_refuse(
    kind: str, key: str, tmp_path: Path
) -> None:
    exact = save_checkpoint(tmp_path, kind).eval()
    edit_config(tmp_path, **{key: "flash_attention_2"})
    model = load_model(tmp_path)
    assert torch.equal(model(IDS).logits, exact(IDS).logits)
    assert "flash" not in str(read_config(tmp_path)._attn_implementation)
    architecture(read_config(tmp_path))


@pytest.mark.parametrize("padding", [99999, -1, 288])
def test_a_padding_id_without_a_row_is_no_reason_to_refuse(padding: int, tmp_path: Path) -> None:
    exact = save_checkpoint(tmp_path, "llama").eval()
    edit_config(tmp_path, pad_token_id=padding)
    assert torch.equal(load_model(tmp_path)(IDS).logits, exact(IDS).logits)


def test_tokens_without_an_embedding_are_refused_by_name(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "llama")
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.add_tokens([f"<new-{number}>" for number in range(20)])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"'<new-19>'.*288 embeddings.*\[tokenizer-too-large\]"):
        load_tokenizer(tmp_path)


def test_a_checkpoint_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"no tokenizer files.*\[tokenizer-missing\]"):
        load_tokenizer(tmp_path)
