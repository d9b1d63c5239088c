"""What a folder of models may hold, and what becomes of each thing in it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from device_models import make_model, save_checkpoint, save_tokenizer, save_upload
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftConfig, PromptTuningConfig, get_peft_model
from test_names import NASTY
from transformers import AutoModelForCausalLM

from deepfusion.errors import InputError
from deepfusion.models.adapters import merged_model
from deepfusion.models.loading import load_model
from deepfusion.models.presets import LORA_TARGETS, resolve
from deepfusion.uploads.intake import given_folders, survey

IDS = torch.randint(1, 280, (2, 12), generator=torch.Generator().manual_seed(0))


def save_adapter(
    folder: Path, base: Path, settings: PeftConfig | None = None, named: str | None = None, seed: int = 0
) -> Any:
    """An adapter as PEFT saves it after a training; returns the adapted model."""
    settings = settings or LoraConfig(r=3, lora_alpha=5, target_modules=LORA_TARGETS, task_type="CAUSAL_LM")
    adapted = get_peft_model(load_model(base), settings)
    torch.manual_seed(seed)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(folder)
    values = json.loads((folder / "adapter_config.json").read_text())
    values["base_model_name_or_path"] = str(base) if named is None else named
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return adapted.eval()


def kinds(folder: Path) -> dict[str, str]:
    return {model.id: model.kind for model in survey(folder).models}


def test_every_entry_is_a_model_or_named(tmp_path: Path) -> None:
    names = [
        name
        for name in NASTY
        if name not in ("", ".", "..") and "/" not in name and len(name.encode("utf-8", "replace")) < 255
    ]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "notes").mkdir()
    (tmp_path / "data.txt").write_text("")
    found = survey(tmp_path)
    assert len(found.models) == len(names)
    assert len({model.id.casefold() for model in found.models}) == len(names)
    assert sorted(model.folder.name for model in found.models) == sorted(names)
    assert found.left_out == ["data.txt (not a folder)", "notes (no config.json)"]


def test_uploads_checkpoints_and_adapters_beside_each_other(tmp_path: Path) -> None:
    save_upload(tmp_path / "upload")
    save_checkpoint(tmp_path / "plain")
    save_adapter(tmp_path / "tuned", tmp_path / "plain")
    assert kinds(tmp_path) == {"upload": "upload", "plain": "checkpoint", "tuned": "adapter"}


def test_the_cache_of_the_hub_and_folders_of_a_training_hold_one_model_each(tmp_path: Path) -> None:
    cached = tmp_path / "models--owner--name"
    for revision in ("1" * 40, "2" * 40):
        save_checkpoint(cached / "snapshots" / revision)
    (cached / "refs").mkdir()
    (cached / "blobs").mkdir()
    (cached / "refs" / "main").write_text("2" * 40)
    save_checkpoint(tmp_path / "trained" / "checkpoint-500")
    found = {model.id: model.folder for model in survey(tmp_path).models}
    assert found == {
        "models--owner--name": cached / "snapshots" / ("2" * 40),
        "trained": tmp_path / "trained" / "checkpoint-500",
    }
    save_checkpoint(tmp_path / "trained" / "checkpoint-1000")
    with pytest.raises(
        InputError,
        match=r"trained: it holds 2 models \(checkpoint-1000, checkpoint-500\).*\[several-models\]",
    ):
        survey(tmp_path)
    assert kinds(tmp_path / "trained") == {"checkpoint-1000": "checkpoint", "checkpoint-500": "checkpoint"}
    with pytest.raises(InputError, match=r"itself one model.*give the folder that holds it"):
        survey(cached)


def test_one_model_is_not_a_folder_of_models(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "one")
    save_checkpoint(tmp_path / "one" / "checkpoint-5")
    with pytest.raises(
        InputError, match=rf"itself one model.*give the folder that holds it: {tmp_path}.*\[no-uploads\]"
    ):
        survey(tmp_path / "one")
    (tmp_path / "config.json").write_text("{}")  # a stray file makes no model of a folder of models
    assert kinds(tmp_path) == {"one": "checkpoint"}


def test_a_run_folder_gives_its_uploads_and_those_that_came_late(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    save_upload(tmp_path / "uploads" / "d0")
    save_upload(tmp_path / "late" / "d1")
    save_upload(tmp_path / "late" / "d0", seed=1)
    found = survey(*given_folders(tmp_path)).models
    assert [(model.folder.parent.name, model.folder.name) for model in found] == [
        ("uploads", "d0"),
        ("late", "d0"),
        ("late", "d1"),
    ]
    assert len({model.id for model in found}) == 3


PLACES: dict[str, Callable[[Path], str]] = {
    "absolute": lambda root: str(root / "elsewhere" / "base"),
    "relative to the adapter": lambda root: "../../elsewhere/base",
    "relative to the folder of all": lambda root: "../elsewhere/base",
    "beside it": lambda root: "base",
    "of the same name, where it was trained": lambda root: "/home/somebody/models/base",
    "of the same name, on the hub": lambda root: "somebody/base",
    "a preset": lambda root: "tiny-gpt2",
}


@pytest.mark.parametrize("place", PLACES)
def test_the_base_of_an_adapter_is_found(place: str, tmp_path: Path) -> None:
    base = Path(resolve("tiny-gpt2")) if place == "a preset" else tmp_path / "elsewhere" / "base"
    if place != "a preset":
        save_checkpoint(base)
    save_adapter(tmp_path / "all" / "tuned", base, named=PLACES[place](tmp_path))
    if "beside" in place or "same name" in place:
        base = Path(shutil.move(base, tmp_path / "all" / "base"))
    found = {model.id: model.base for model in survey(tmp_path / "all").models}
    assert found["tuned"] == base.resolve()


def test_a_base_that_is_not_at_hand_is_named_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    save_checkpoint(tmp_path / "base")
    save_adapter(tmp_path / "all" / "tuned", tmp_path / "base", named="somebody/base-7b")
    with pytest.raises(
        InputError, match=r"all/tuned.*needs its base somebody/base-7b.*as base-7b.*\[adapter-base-missing\]"
    ):
        survey(tmp_path / "all")


LORA = {"r": 4, "task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj", "down_proj"]}
ADAPTERS: dict[str, PeftConfig] = {
    "lora": LoraConfig(**LORA),
    "rslora": LoraConfig(**LORA, use_rslora=True, lora_alpha=7),
    "dora": LoraConfig(**LORA, use_dora=True),
    "ranks and alphas by layer": LoraConfig(**LORA, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 9}),
    "head and embeddings of its own": LoraConfig(**LORA, modules_to_save=["lm_head", "embed_tokens"]),
    "pissa": LoraConfig(**LORA, init_lora_weights="pissa"),
    "ia3": IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "adalora": AdaLoraConfig(**LORA, total_step=10),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_is_merged_into_what_it_computes(kind: str, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "base", "llama")
    adapted = save_adapter(tmp_path / "adapter", tmp_path / "base", ADAPTERS[kind])
    wanted, untouched = adapted(IDS).logits, load_model(tmp_path / "base")(IDS).logits
    merged = merged_model(tmp_path / "adapter", tmp_path / "base")
    torch.testing.assert_close(merged(IDS).logits, wanted, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(wanted, untouched, atol=1e-2)
    merged.save_pretrained(tmp_path / "out")
    save_tokenizer(tmp_path / "out")
    assert torch.equal(load_model(tmp_path / "out")(IDS).logits, merged(IDS).logits)


def test_trained_biases_come_along(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "base", "gpt2")
    settings = LoraConfig(
        r=2, task_type="CAUSAL_LM", target_modules=["c_attn"], bias="all", fan_in_fan_out=True
    )
    adapted = save_adapter(tmp_path / "adapter", tmp_path / "base", settings)
    merged = merged_model(tmp_path / "adapter", tmp_path / "base")
    torch.testing.assert_close(merged(IDS).logits, adapted(IDS).logits, rtol=1e-3, atol=1e-4)


def test_tokens_that_came_with_an_adapter_get_their_embeddings(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "base", "llama")
    larger = make_model("llama")
    larger.load_state_dict(load_model(tmp_path / "base").state_dict())
    larger.resize_token_embeddings(300)
    larger.save_pretrained(tmp_path / "larger")
    save_tokenizer(tmp_path / "larger")
    settings = LoraConfig(**LORA, modules_to_save=["lm_head", "embed_tokens"])
    adapted = save_adapter(tmp_path / "adapter", tmp_path / "larger", settings, named=str(tmp_path / "base"))
    merged = merged_model(tmp_path / "adapter", tmp_path / "base")
    assert merged.config.vocab_size == 300
    ids = torch.arange(280, 300)[None]
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-3, atol=1e-4)


def test_a_tied_head_that_was_trained_apart_is_untied(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "base", "llama", tie_word_embeddings=True)
    apart = save_adapter(
        tmp_path / "apart", tmp_path / "base", LoraConfig(**LORA, modules_to_save=["lm_head"])
    )
    merged_model(tmp_path / "apart", tmp_path / "base").save_pretrained(tmp_path / "out")
    torch.testing.assert_close(
        load_model(tmp_path / "out")(IDS).logits, apart(IDS).logits, rtol=1e-3, atol=1e-4
    )


def test_a_tied_head_that_was_adapted_apart_is_merged_right_or_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "base", "llama", tie_word_embeddings=True)
    settings = LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"])
    apart = save_adapter(tmp_path / "apart", tmp_path / "base", settings)
    try:
        merged = merged_model(tmp_path / "apart", tmp_path / "base")
    except InputError as error:
        assert error.code == "adapter-differs"  # noqa: PT017
        return
    merged.save_pretrained(tmp_path / "out")
    torch.testing.assert_close(
        load_model(tmp_path / "out")(IDS).logits, apart(IDS).logits, rtol=1e-3, atol=1e-4
    )


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "base", "llama")
    save_checkpoint(tmp_path / "other", "gpt2")
    save_adapter(tmp_path / "adapter", tmp_path / "base")
    wide = make_model("llama").config
    wide.intermediate_size = 32
    AutoModelForCausalLM.from_config(wide).save_pretrained(tmp_path / "wide")
    for base in ("other", "wide"):
        with pytest.raises(InputError, match=r"\[adapter-differs\]"):
            merged_model(tmp_path / "adapter", tmp_path / base)


def _set(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "pickled": (
        lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
        r"pickled.*\[weights-missing\]",
    ),
    "another task": (_set(task_type="SEQ_CLS"), r"SEQ_CLS.*\[bad-adapter-config\]"),
    "no merge": (_set(peft_type="PREFIX_TUNING"), r"PREFIX_TUNING.*cannot be merged.*\[bad-adapter-config\]"),
    "unheard of": (_set(peft_type="MAGIC"), r"MAGIC.*\[bad-adapter-config\]"),
    "code": (_set(megatron_config={"x": 1}), r"megatron_config.*\[bad-adapter-config\]"),
    "no JSON": (lambda f: (f / "adapter_config.json").write_text("{"), r"\[bad-json\]"),
    "no base": (_set(base_model_name_or_path=None), r"names none.*\[adapter-base-missing\]"),
    "another revision": (
        _set(base_model_name_or_path="a/b", revision="v2"),
        r"revision v2.*\[adapter-base-missing\]",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_adapter_that_cannot_be_merged_is_refused_before_any_work(case: str, tmp_path: Path) -> None:
    edit, message = REFUSED[case]
    save_checkpoint(tmp_path / "base")
    save_adapter(tmp_path / "all" / "tuned", tmp_path / "base")
    edit(tmp_path / "all" / "tuned")
    with pytest.raises(InputError, match=message):
        survey(tmp_path / "all")


def test_prompts_are_no_weights(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "base", "llama")
    save_adapter(
        tmp_path / "all" / "tuned",
        tmp_path / "base",
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    )
    with pytest.raises(InputError, match=r"PROMPT_TUNING, which cannot be merged"):
        survey(tmp_path / "all")


def test_the_note_beside_an_upload_is_no_part_of_the_folder(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "clinic")
    (tmp_path / ".clinic.made.json").write_text('{"request": "x"}\n')
    (tmp_path / "notes.txt").write_text("mine")
    assert survey(tmp_path).left_out == ["notes.txt (not a folder)"]
