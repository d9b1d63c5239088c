"""What the tests of whole runs share: minuscule checkpoints, real sentences of three domains, and a small config."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import rich
import torch
import yaml
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DeepseekV2Config,
    DeepseekV3Config,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from deepfusion import pipeline, progress
from deepfusion.cli import main
from deepfusion.config import load_config
from deepfusion.digests import sha256_file

# No test may fail for the speed of the machine.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

torch.set_num_threads(1)
progress.to_terminal()  # as the command line does: what is said is on stderr, whichever test comes first
# In the background of a script SIGINT is ignored, and processes that a test starts, to end with Ctrl-C, would inherit
# that.
signal.signal(signal.SIGINT, signal.default_int_handler)

SUBJECTS = {
    "medicine": (
        ["The patient", "A nurse", "The surgeon", "This child", "An old man", "The clinic"],
        ["was given", "refused", "needs", "asked for", "recovered after"],
        [
            "a low dose of aspirin",
            "two weeks of rest",
            "a scan of the chest",
            "warm fluids",
            "a new vaccine",
            "insulin",
        ],
        ["before the operation.", "because of a high fever.", "and felt better.", "on the third day."],
    ),
    "finance": (
        ["The bank", "A lender", "The fund", "Our broker", "This company", "The central bank"],
        ["sold", "bought back", "priced", "borrowed against", "wrote off"],
        [
            "a ten year bond",
            "its own shares",
            "the whole loan book",
            "cheap index funds",
            "a foreign currency",
            "gold",
        ],
        ["at a steep discount.", "as interest rates rose.", "to raise cash.", "in the last quarter."],
    ),
    "cooking": (
        ["The cook", "My aunt", "A baker", "The chef", "Our guest", "The kitchen"],
        ["stirred", "roasted", "salted", "served", "chopped"],
        [
            "a pot of lentils",
            "ripe tomatoes",
            "the sourdough loaf",
            "garlic and onions",
            "fresh pasta",
            "brown butter",
        ],
        ["for half an hour.", "over a low flame.", "with olive oil.", "until it was golden."],
    ),
}


def sentences(domain: str, count: int, seed: int = 0) -> list[dict[str, str]]:
    """Distinct rows {"text", "domain"} of one domain."""
    generator = random.Random(f"{domain} {seed}")
    texts: dict[str, None] = {}
    while len(texts) < count:
        texts[" ".join(" ".join(map(generator.choice, SUBJECTS[domain])) for _ in range(2))] = None
    return [{"text": text, "domain": domain} for text in texts]


def questions(count: int) -> list[dict[str, Any]]:
    """Multiple-choice rows of the domain medicine."""
    generator = random.Random("questions")
    _, _, things, _ = SUBJECTS["medicine"]
    rows = []
    for number in range(count):
        options = generator.sample(things, 3)
        question = f"What did patient {number} of the clinic need?"
        rows.append(
            {"question": question, "options": options, "answer": options[number % 3], "domain": "medicine"}
        )
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def _tokenizer(kind: str, vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE, or metaspace BPE as of Llama, trained on half of the domains so that vocabularies differ."""
    texts = [row["text"] for domain in SUBJECTS for row in sentences(domain, 40, seed=vocabulary)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>" if kind == "metaspace" else None))
    if kind == "metaspace":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=["<unk>", "<s>", "</s>"])
        special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=["<|end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
        special = {"bos_token": "<|end|>", "eos_token": "<|end|>"}
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def save_checkpoint(
    folder: Path, config: PretrainedConfig, tokenizer: PreTrainedTokenizerFast, seed: int = 0
) -> Path:
    """A random model with its tokenizer as a Hugging Face checkpoint."""
    torch.manual_seed(seed)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        None,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Minuscule public checkpoints: three on-device types with tokenizers of their own and a base for each family."""
    root = tmp_path_factory.mktemp("zoo")
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    base = {
        **small,
        "hidden_size": 32,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "vocab_size": 320,
    }
    latent = {
        "q_lora_rank": None,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "qk_nope_head_dim": 8,
    }
    shared = _tokenizer("bytes", 320)
    types: dict[str, tuple[PretrainedConfig, PreTrainedTokenizerFast]] = {
        "mini-gpt2": (
            GPT2Config(
                vocab_size=300,
                n_embd=16,
                n_layer=2,
                n_head=2,
                n_positions=128,
                resid_pdrop=0.1,
                embd_pdrop=0.1,
            ),
            _tokenizer("bytes", 300),
        ),
        "mini-llama": (
            LlamaConfig(vocab_size=200, max_position_embeddings=128, **small),
            _tokenizer("metaspace", 200),
        ),
        "mini-bloom": (
            BloomConfig(vocab_size=290, hidden_size=16, n_layer=2, n_head=2),
            _tokenizer("bytes", 290),
        ),
        "qwen2_moe": (Qwen2Config(**base), shared),
        "qwen3_moe": (Qwen3Config(head_dim=16, **base), shared),
        "deepseek": (LlamaConfig(**base), shared),
        "deepseek_v2": (DeepseekV2Config(**base, **latent, first_k_dense_replace=2), shared),
        "deepseek_v3": (DeepseekV3Config(**base, **latent, first_k_dense_replace=2), shared),
    }
    for config, tokenizer in types.values():
        config.vocab_size = len(tokenizer)
    return {name: save_checkpoint(root / name, *parts) for name, parts in types.items()}


@pytest.fixture
def settings(zoo: dict[str, Path], tmp_path: Path) -> dict[str, Any]:
    """`small_settings` with private text in `tmp_path`."""
    return small_settings(zoo, tmp_path)


def small_settings(zoo: dict[str, Path], folder: Path) -> dict[str, Any]:
    """A config of four devices, two model types and two domains that runs in seconds; writes private text to
    `folder`.
    """
    medicine = write_rows(folder / "medicine.jsonl", sentences("medicine", 40) + questions(8))
    finance = write_rows(folder / "finance.jsonl", sentences("finance", 40))
    gpt2, llama = str(zoo["mini-gpt2"]), str(zoo["mini-llama"])
    return {
        "family": "qwen3_moe",
        "experts": 2,
        "devices": [
            {"id": "ward", "type": gpt2, "data": str(medicine)},
            {"id": "clinic", "type": gpt2, "data": str(medicine)},
            {"id": "bank", "type": llama, "data": str(finance)},
            {"id": "fund", "type": llama, "data": str(finance)},
        ],
        "jobs": 1,
        "precision": "fp32",
        "data": {"public": ["in_domain"], "public_fraction": 0.2, "sampled_documents": 4, "max_chars": 96},
        "device": {"steps": 4, "batch_size": 4},
        "distill": {
            "base": str(zoo["qwen3_moe"]),
            "steps": 8,
            "batch_size": 4,
            "vaa": {"patches": 8, "width": 8, "heads": 2},
        },
        "tune": {"steps": 4, "batch_size": 4},
        "evaluate": {"max_documents": 4},
    }


def run_settings(values: dict[str, Any], out: Path, **options: Any) -> None:
    """The pipeline in this process, on the config file that the command line would read."""
    out.parent.mkdir(parents=True, exist_ok=True)
    pipeline.run(load_config(write_config(out.with_suffix(".yaml"), values)), out, **options)


def overlay(settings: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The settings with changes; a section is changed key by key."""
    return settings | {
        key: {**settings.get(key, {}), **value} if isinstance(value, dict) else value
        for key, value in changes.items()
    }


def digests(run: Path, *names: str) -> dict[str, str]:
    """SHA-256 of every file below the named artefacts of a run folder."""
    files = sorted(path for name in names for path in (run / name).rglob("*") if path.is_file())
    return {str(path.relative_to(run)): sha256_file(path) for path in files}


def write_config(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(values), "utf-8")
    return path


class Outcome(NamedTuple):
    """Exit code, stdout and stderr of a command."""

    code: int
    out: str
    err: str


@pytest.fixture
def invoke(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Runs the entry point of the command line in this process: `invoke("status", run)`."""

    def call(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["deepfusion", *map(str, arguments)])
        capfd.readouterr()
        rich.reconfigure()  # as in a process of its own: the width of this moment, not of the test before
        with pytest.raises(SystemExit) as left:
            main()
        return Outcome(int(left.value.code or 0), *capfd.readouterr())

    return call


@pytest.fixture(scope="session")
def command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the real command line in a process of its own: `command("run", "config.yaml", "--out", run)`."""

    def call(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "deepfusion.cli", *map(str, arguments)]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            line, capture_output=True, text=True, env=environment, cwd=cwd, timeout=600, check=False
        )

    return call
