"""The feature embedding `e_n` of a device's private text [DF eq. 6], the only fact about it that leaves the device."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from deepfusion.errors import InputError

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_VARIABLE = (
    "DEEPFUSION_MINILM"  # environment variable: folder of the sentence encoder, where there is no network
)
_BUCKETS = 2**16
_PROJECTION_SEED = 20260214  # every device must project alike


def embed(
    texts: Sequence[str], encoder: str = "hashing", size: int = 64, model: str | None = None
) -> np.ndarray:
    """Embed a device's texts: the mean over its documents, float32 [size], of length 1.

    Args:
        texts: at least one document.
        encoder: `hashing` counts words without any vocabulary or download and projects the counts to `size` random
            directions; `minilm` is a sentence encoder, whose 384 numbers are projected likewise if `size` is less.
        size: numbers that leave the device, 4 bytes each.
        model: hub name or folder of the sentence encoder; default the environment variable DEEPFUSION_MINILM.

    Raises:
        InputError: no text, or the sentence encoder cannot be loaded.
    """
    if not texts or not any(text.strip() for text in texts):
        raise InputError("there is no text to embed", code="no-text")
    mean = (
        _hashed(texts)
        if encoder == "hashing"
        else _minilm(texts, model or os.environ.get(MINILM_VARIABLE, MINILM))
    )
    if len(mean) > size:
        mean = _project(mean, size)
    norm = float(np.linalg.norm(mean))
    # Texts of stop words alone have no direction; any fixed one will do.
    return (mean / norm if norm > 0 else np.eye(1, len(mean))[0]).astype(np.float32)


def _hashed(texts: Sequence[str]) -> np.ndarray:
    from sklearn.feature_extraction.text import HashingVectorizer  # takes a second that few commands need
    from sklearn.preprocessing import normalize

    # Common English words are left out: they are alike in every domain and push all cosines towards 1.
    # Of the variants tried on four domains with 20 to 100 documents a device, single words with logarithmic counts
    # separated best; pairs of words add noise at this length.
    counter = HashingVectorizer(n_features=_BUCKETS, stop_words="english", norm=None, alternate_sign=False)
    return np.asarray(normalize(counter.transform(texts).log1p()).mean(axis=0)).ravel()


def _minilm(texts: Sequence[str], model: str) -> np.ndarray:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        fix = "pip install deepfusion[minilm]"
        raise InputError(
            "sentence-transformers is missing", where="device.encoder", fix=fix, code="no-minilm"
        ) from None
    try:
        loaded = SentenceTransformer(model, device="cpu", trust_remote_code=False)
    except (OSError, ValueError) as error:
        what = f"the sentence encoder cannot be loaded ({str(error).splitlines()[0]})"
        fix = f"set {MINILM_VARIABLE} to a folder that holds it"
        raise InputError(what, where=model, fix=fix, code="no-minilm") from None
    return np.asarray(loaded.encode(list(texts), normalize_embeddings=True, show_progress_bar=False)).mean(
        axis=0
    )


def _project(vector: np.ndarray, size: int) -> np.ndarray:
    """A random projection, which keeps angles: the same signs on every device."""
    signs = np.random.default_rng(_PROJECTION_SEED).integers(0, 2, (len(vector), size), dtype=np.int8) * 2 - 1
    return vector @ signs / np.sqrt(size)
