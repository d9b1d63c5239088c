"""Type signatures: what makes the weights of two models averageable."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from tokenizers import Tokenizer

from deepfusion.errors import InputError
from deepfusion.models.architecture import architecture, first_line, read_config

# Keys of a config that do not change what the weights mean.
_BOOKKEEPING = re.compile(
    r"(transformers_version|_name_or_path|architectures|dtype|torch_dtype|use_cache|task_specific_params|\w*_token_id"
    r"|\w*(dropout|pdrop)\w*|initializer_range|return_dict|output_\w+|pretraining_tp|slow_but_exact|_attn_implementation\w*)"
)


def type_signature(folder: str | Path, base: str = "") -> str:
    """Digest of class, shapes, architecture settings, tokenizer and base checkpoint, 64 hex digits.

    Only models of equal signatures are averaged. Weights that started from different checkpoints lie in different
    basins, and the same shapes with another number of heads or another vocabulary mean something else.

    Args:
        folder: holds `config.json` and `tokenizer.json`.
        base: digest of the weights that training started from, empty where unknown.
    """
    config = read_config(folder)
    layout = architecture(config)
    settings = {key: value for key, value in config.to_dict().items() if not _BOOKKEEPING.fullmatch(key)}
    parts = [layout.name, sorted(layout.tensors.items()), settings, tokenizer_digest(folder), base]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def tokenizer_digest(folder: str | Path) -> str:
    """Digest of what a tokenizer does to text, 64 hex digits; how `tokenizer.json` is laid out does not matter."""
    path = Path(folder) / "tokenizer.json"
    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise InputError(
            f"not a readable tokenizer ({first_line(error)})", where=path, code="bad-tokenizer"
        ) from None
    backend.no_padding()
    backend.no_truncation()
    return hashlib.sha256(backend.to_str().encode()).hexdigest()
