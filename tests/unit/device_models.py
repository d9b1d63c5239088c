"""Minuscule device models, tokenizers and uploads on disk, for the tests of models, uploads and the stages of phase
I.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from deepfusion.models.architecture import architecture, read_config
from deepfusion.models.compact import open_base, write_delta
from deepfusion.models.loading import load_model
from deepfusion.models.presets import LORA_TARGETS, base_digest
from deepfusion.models.signature import type_signature
from deepfusion.records import Card, Cluster, Clusters, RegistryEntry, Similarity
from deepfusion.sections import Encoding
from deepfusion.uploads.card import write_card

TEXT = ["the cat sat on the mat", "a dog ran over the hill and far away", "one two three four five six seven"]
DIMENSIONS = {
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "llama": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2},
    "olmo": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2},
    "bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 2},
}


def save_tokenizer(folder: Path, vocab: int = 280) -> PreTrainedTokenizerFast:
    backend = Tokenizer(tokenizer_models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=vocab, special_tokens=["<end>"], initial_alphabet=alphabet)
    )
    special = dict.fromkeys(("eos_token", "bos_token", "pad_token"), "<end>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_model(kind: str = "gpt2", seed: int = 0, **changes: object) -> PreTrainedModel:
    torch.manual_seed(seed)
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = AutoConfig.for_model(kind, vocab_size=288, **DIMENSIONS[kind], **special, **changes)
    return AutoModelForCausalLM.from_config(config)


def save_checkpoint(folder: Path, kind: str = "gpt2", seed: int = 0, **changes: object) -> PreTrainedModel:
    model = make_model(kind, seed, **changes)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model


def unit(seed: int, size: int = 8) -> list[float]:
    vector = np.random.default_rng(seed).normal(size=size)
    return (vector / np.linalg.norm(vector)).tolist()


FACTS = {"base": "tiny-gpt2", "base_digest": "0" * 64, "method": "full", "embedding": unit(0), "encoder": "hashing",
         "tokens": 100, "documents": 10, "loss_before": 5.0, "loss_after": 4.0, "steps": 3, "seed": 0,
         "deepfusion_version": "0"}  # fmt: skip


def card(folder: Path, device: str, **facts: object) -> Card:
    digest = str(facts.get("base_digest", FACTS["base_digest"]))
    values = {
        "device": device,
        "type": "tiny",
        "model_class": architecture(read_config(folder)).name,
        "signature": type_signature(folder, digest),
    }
    return Card.model_validate(FACTS | values | facts)


def entry(device: str, **facts: object) -> RegistryEntry:
    """What the registry says of a sound upload."""
    values = {"device": device, "type": "tiny", "model_class": "GPT2LMHeadModel", "signature": "5" * 64,
              "bytes": 1000, "digest": "ab" * 32}  # fmt: skip
    return RegistryEntry.model_validate(FACTS | values | facts)


def grouped(*clusters: list[str], types: tuple[str, ...] = ()) -> Clusters:
    """What the cluster stage says of devices in these groups; `types` names the model type of each group."""
    devices = [device for group in clusters for device in group]
    found = [
        Cluster(id=k, type=types[k] if types else "tiny", signature="5" * 64, devices=group, tokens=100)
        for k, group in enumerate(clusters)
    ]
    return Clusters(
        experts=len(clusters),
        types=[],
        clusters=found,
        assignment={device: cluster.id for cluster in found for device in cluster.devices},
        similarity=Similarity(devices=devices, matrix=[[1.0] * len(devices)] * len(devices)),
    )


def save_upload(folder: Path, kind: str = "gpt2", seed: int = 0, **facts: object) -> Card:
    """A sound upload of full weights; `facts` go into its card."""
    save_checkpoint(folder, kind, seed)
    return write_card(folder, card(folder, folder.name, **facts))


def save_adapter_upload(
    folder: Path, base: Path, seed: int = 0, rslora: bool = False, **facts: object
) -> PreTrainedModel:
    """A sound upload of a LoRA adapter of the checkpoint `base`; returns the model it stands for."""
    model = load_model(base)
    targets = LORA_TARGETS
    lora = LoraConfig(r=3, lora_alpha=5, target_modules=targets, task_type="CAUSAL_LM", use_rslora=rslora)
    adapted = get_peft_model(model, lora)
    torch.manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    model.config.save_pretrained(folder)
    save_tokenizer(folder)
    digest = base_digest(str(base))
    write_card(folder, card(folder, folder.name, method="lora", base=str(base), base_digest=digest, **facts))
    return adapted.merge_and_unload()


def save_compact_upload(
    folder: Path, base: Path, encoding: Encoding = "delta8", seed: int = 0, **facts: object
) -> PreTrainedModel:
    """A sound compact upload of the checkpoint `base` with every weight moved a little; returns the exact model in
    fp32.
    """
    model = load_model(base)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    folder.mkdir(parents=True, exist_ok=True)
    error = write_delta(folder, model.state_dict(), open_base(str(base)), encoding)
    read_config(base).save_pretrained(folder)
    save_tokenizer(folder)
    about = {
        "base": str(base),
        "base_digest": base_digest(str(base)),
        "encoding": encoding,
        "encoding_error": error,
    }
    write_card(folder, card(folder, folder.name, **about, **facts))
    return model
