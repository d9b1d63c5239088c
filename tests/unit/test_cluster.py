from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from device_models import entry as registered
from device_models import unit
from hypothesis import given
from hypothesis import strategies as st

from deepfusion.config import parse_config
from deepfusion.errors import InputError
from deepfusion.records import Registry, RegistryEntry
from deepfusion.stages import cluster


def entry(device: str, embedding: list[float], type: str = "a", tokens: int = 100) -> RegistryEntry:
    signature = hashlib.sha256(type.encode()).hexdigest()
    return registered(device, embedding=embedding, signature=signature, type=type, tokens=tokens)


def near(centre: int, number: int) -> list[float]:
    """A unit vector close to the direction `centre`."""
    noise = np.random.default_rng(100 * centre + number).normal(0, 0.05, 8)
    vector = np.eye(8)[centre] + noise
    return (vector / np.linalg.norm(vector)).tolist()


def run(folder: Path, entries: list[RegistryEntry], **changes: Any) -> dict[str, Any]:
    Registry(entries).write(folder / "registry.json")
    cluster.run(
        parse_config({"top_k": 1, "tune": {"steps": 0}, **changes}),
        {"registry": folder / "registry.json"},
        folder,
    )
    return json.loads((folder / "clusters.json").read_text())


def members(result: dict[str, Any]) -> set[frozenset[str]]:
    return {frozenset(cluster["devices"]) for cluster in result["clusters"]}


def test_devices_of_like_knowledge_meet(tmp_path: Path) -> None:
    entries = [
        entry(f"d{centre}{number}", near(centre, number)) for centre in range(3) for number in range(4)
    ]
    result = run(tmp_path, entries, experts=3)
    assert members(result) == {frozenset(f"d{centre}{number}" for number in range(4)) for centre in range(3)}
    assert [cluster["id"] for cluster in result["clusters"]] == [0, 1, 2]
    assert all(cluster["tokens"] == 400 for cluster in result["clusters"])
    assert all(device in result["clusters"][k]["devices"] for device, k in result["assignment"].items())
    matrix = np.array(result["similarity"]["matrix"])
    assert np.allclose(np.diag(matrix), 1)
    assert np.allclose(matrix, matrix.T)


def test_only_devices_of_one_type_share_a_cluster(tmp_path: Path) -> None:
    entries = [entry(f"{type}{number}", near(0, number), type) for type in "ab" for number in range(3)]
    result = run(tmp_path, entries, experts=3)
    for found in result["clusters"]:
        assert {device[0] for device in found["devices"]} == {found["type"]}
    assert sum(row["share"] for row in result["types"]) == 3


def test_types_share_the_clusters_by_tokens(tmp_path: Path) -> None:
    entries = [entry(f"a{n}", near(n, n), "a", tokens=10) for n in range(4)]
    entries += [entry(f"b{n}", near(n, n), "b", tokens=90) for n in range(4)]
    shares = {row["type"]: row["share"] for row in run(tmp_path, entries, experts=5)["types"]}
    assert shares == {"a": 1, "b": 4}


def test_the_order_of_the_registry_does_not_matter(tmp_path: Path) -> None:
    entries = [entry(f"d{number}", unit(number)) for number in range(9)]
    assert run(tmp_path, entries, experts=4) == run(tmp_path, entries[::-1], experts=4)


def test_equal_embeddings_and_unknown_token_counts_leave_no_cluster_empty(tmp_path: Path) -> None:
    entries = [entry(f"d{number}", unit(0), tokens=0) for number in range(5)]
    result = run(tmp_path, entries, experts=4)
    assert len(result["clusters"]) == 4
    assert sorted(device for found in result["clusters"] for device in found["devices"]) == [
        f"d{n}" for n in range(5)
    ]
    assert all(found["devices"] for found in result["clusters"])


def test_the_random_control_ignores_the_text(tmp_path: Path) -> None:
    entries = [
        entry(f"d{centre}{number}", near(centre, number)) for centre in range(3) for number in range(4)
    ]
    changes = {"experts": 3, "clustering": {"assignment": "random"}}
    first = run(tmp_path, entries, **changes)
    assert members(first) == members(run(tmp_path, entries, **changes))
    assert members(first) != members(run(tmp_path, entries, experts=3))
    assert all(len(found["devices"]) == 4 for found in first["clusters"])
    assert members(first) != members(run(tmp_path, entries, **changes, seed=1))


@pytest.mark.parametrize(
    ("proxies", "experts", "clusters"),
    [(None, 3, 3), (5, 3, 5), (16, 3, 6), (16, 6, 6), (5, 1, 5)],
)
def test_a_trunk_may_learn_from_more_proxies_than_there_are_experts(
    proxies, experts, clusters, tmp_path: Path
) -> None:
    entries = [entry(f"{type}{number}", unit(number), type) for type in "ab" for number in range(3)]
    changes = {"clustering": {"proxies": proxies}, "distill": {"trunk_share": 1.0}}
    if experts == 1:
        with pytest.raises(InputError, match="more-types-than-experts"):
            run(tmp_path, entries, experts=1, **{**changes, "clustering": {}})
    assert len(run(tmp_path, entries, experts=experts, **changes)["clusters"]) == clusters


@pytest.mark.parametrize(
    ("types", "experts", "code"),
    [("abc", 2, "more-types-than-experts"), ("aaa", 4, "fewer-devices-than-experts")],
)
def test_impossible_counts_are_the_users_error(types: str, experts: int, code: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=code):
        run(tmp_path, [entry(f"d{n}", unit(n), type) for n, type in enumerate(types)], experts=experts)


def test_embeddings_of_other_lengths_are_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="embeddings-differ"):
        run(tmp_path, [entry("d0", unit(0)), entry("d1", unit(1, 4))], experts=1)


@given(st.data())
def test_shares_add_up_and_stay_within_their_bounds(data: st.DataObject) -> None:
    devices = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=6))
    tokens = data.draw(st.lists(st.integers(1, 10**9), min_size=len(devices), max_size=len(devices)))
    clusters = data.draw(st.integers(len(devices), sum(devices)))
    shares = cluster.share_out(clusters, tokens, devices)
    assert sum(shares) == clusters
    assert all(1 <= share <= limit for share, limit in zip(shares, devices, strict=True))
    exact = [clusters * count / sum(tokens) for count in tokens]
    if all(quota >= 1 and quota + 1 <= limit for quota, limit in zip(exact, devices, strict=True)):
        assert all(abs(share - quota) < 1 for share, quota in zip(shares, exact, strict=True))
