"""The feature embedding `e_n` of a device's private text [DF eq. 6]: the only fact about the text that leaves the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sklearn.feature_extraction.text import HashingVectorizer

from deepfusion.errors import InputError

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
_BUCKETS = 2**16
_PROJECTION_SEED = 20260214  # every device must project alike


def embed(texts: Sequence[str], encoder: str = "hashing", size: int = 64, model: str | None = None) -> np.ndarray:
    """Embed a device's texts: the mean over its documents, float32 [size], of length 1.

    Args:
        texts: at least one document.
        encoder: `hashing` counts words and pairs of words without any vocabulary or download, and projects them to `size`
            random directions; `minilm` is a sentence encoder, whose 384 numbers are projected likewise if `size` is less.
        size: numbers that leave the device, 4 bytes each.
        model: hub name or folder of the sentence encoder.

    Raises:
        InputError: no text, or the sentence encoder cannot be loaded.
    """
    if not texts or not any(text.strip() for text in texts):
        raise InputError("there is no text to embed", code="no-text")
    mean = _hashed(texts) if encoder == "hashing" else _minilm(texts, model or MINILM)
    if len(mean) > size:
        mean = _project(mean, size)
    norm = float(np.linalg.norm(mean))
    # Texts of stop words alone have no direction; any fixed one will do.
    return (mean / norm if norm > 0 else np.eye(1, len(mean))[0]).astype(np.float32)


def _hashed(texts: Sequence[str]) -> np.ndarray:
    # Common English words are left out: they are alike in every domain and push all cosines towards 1.
    vectorizer = HashingVectorizer(n_features=_BUCKETS, ngram_range=(1, 2), stop_words="english", norm="l2")
    return np.asarray(vectorizer.transform(texts).mean(axis=0)).ravel()


def _minilm(texts: Sequence[str], model: str) -> np.ndarray:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise InputError(
            "sentence-transformers is not installed", where="device.encoder", fix="pip install deepfusion[minilm]", code="no-minilm"
        ) from None
    try:
        loaded = SentenceTransformer(model, device="cpu", trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(
            f"the sentence encoder cannot be loaded ({str(error).splitlines()[0]})", where=model,
            fix="name a local folder that holds it", code="no-minilm",
        ) from None  # fmt: skip
    return np.asarray(loaded.encode(list(texts), normalize_embeddings=True, show_progress_bar=False)).mean(axis=0)


def _project(vector: np.ndarray, size: int) -> np.ndarray:
    """A random projection, which keeps angles: the same signs on every device."""
    signs = np.random.default_rng(_PROJECTION_SEED).integers(0, 2, (len(vector), size), dtype=np.int8) * 2 - 1
    return vector @ signs / np.sqrt(size)
