"""Phase I: group the devices into knowledge domains [DF eq. 6], sharing the clusters out among the model types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from deepfusion import plugins
from deepfusion.errors import InputError
from deepfusion.records import Cluster, Clusters, Registry, RegistryEntry, Similarity, TypeShare
from deepfusion.schema import Config, cluster_count


def run(config: Config, inputs: dict[str, Path], out: Path) -> dict[str, Any]:
    """Writes `out`/clusters.json: the share of each type, the members of each cluster, and all similarities.

    Raises:
        InputError: more types than experts, fewer devices than experts, or embeddings that cannot be compared.
    """
    devices = sorted(Registry.read(inputs["registry"]).root, key=lambda entry: entry.device)
    embeddings = _normalised(devices)
    types: dict[str, list[int]] = {}
    for index, entry in enumerate(devices):
        types.setdefault(entry.signature, []).append(index)
    count = cluster_count(config, len(devices), len(types))
    tokens = [max(1, sum(devices[i].tokens for i in members)) for members in types.values()]
    shares = share_out(count, tokens, [len(members) for members in types.values()])

    clusters: list[Cluster] = []
    for (signature, members), share in zip(types.items(), shares, strict=True):
        for group in _group(embeddings[members], share, config):
            chosen = [devices[members[i]] for i in group]
            clusters.append(
                Cluster(
                    id=len(clusters), type=chosen[0].type, signature=signature,
                    devices=[entry.device for entry in chosen], tokens=sum(entry.tokens for entry in chosen),
                )
            )  # fmt: skip
    Clusters(
        experts=config.experts,
        types=[
            TypeShare(signature=signature, type=devices[members[0]].type, devices=len(members), share=share)
            for (signature, members), share in zip(types.items(), shares, strict=True)
        ],
        clusters=clusters,
        assignment={device: cluster.id for cluster in clusters for device in cluster.devices},
        similarity=Similarity(
            devices=[entry.device for entry in devices],
            matrix=np.round(embeddings @ embeddings.T, 6).tolist(),
        ),
    ).write(out / "clusters.json")
    return {"types": len(types), "clusters": [cluster.devices for cluster in clusters]}


def share_out(clusters: int, tokens: list[int], devices: list[int]) -> list[int]:
    """Share `clusters` clusters out among model types: at least 1 and at most `devices[i]` each, else by `tokens`.

    Largest remainder, with what a type cannot use going to the others; the lower index wins ties.
    """
    shares = [1] * len(tokens)
    quota = np.array(tokens, float) / sum(tokens) * clusters
    while sum(shares) < clusters:
        lack = [q - s if s < limit else -np.inf for q, s, limit in zip(quota, shares, devices, strict=True)]
        shares[int(np.argmax(lack))] += 1
    return shares


def _normalised(devices: list[RegistryEntry]) -> np.ndarray:
    """Unit embeddings, float64 [devices, size]."""
    first = devices[0]
    for entry in devices[1:]:
        if (entry.encoder, len(entry.embedding)) != (first.encoder, len(first.embedding)):
            raise InputError(
                f"its embedding is {entry.encoder} of length {len(entry.embedding)}",
                where=f"device {entry.device}",
                allowed=f"{first.encoder} of length {len(first.embedding)}, as of device {first.device}",
                fix="make the upload again with the same device.encoder and device.embedding_size",
                code="embeddings-differ",
            )
    matrix = np.array([entry.embedding for entry in devices])
    return matrix / np.linalg.norm(matrix, axis=1, keepdims=True).clip(1e-12)


def kmeans(embeddings: np.ndarray, clusters: int, config: Config) -> np.ndarray:
    """K-means on the unit sphere; `clustering.assignment: kmeans`."""
    from sklearn.cluster import KMeans  # takes a second that few commands need

    found = KMeans(clusters, n_init=config.clustering.restarts, random_state=config.seed)
    labels = found.fit_predict(embeddings)
    _fill_empty(labels, found.transform(embeddings), clusters)
    return labels


def random(embeddings: np.ndarray, clusters: int, config: Config) -> np.ndarray:
    """Equal shares at random, a control; `clustering.assignment: random`."""
    return np.random.default_rng(config.seed).permutation(np.arange(len(embeddings)) % clusters)


def _group(embeddings: np.ndarray, clusters: int, config: Config) -> list[list[int]]:
    """Members of each cluster, none empty, ordered by their first member."""
    name = config.clustering.assignment
    rule = plugins.load("clusterings", name)
    with plugins.blamed("clusterings", rule):
        labels = rule(embeddings, clusters, config)
    try:
        labels = np.asarray(labels)
    except ValueError:  # rows of different lengths
        labels = np.empty(0)
    if labels.shape != (len(embeddings),) or set(labels.tolist()) != set(range(clusters)):
        raise InputError(
            f"{name} does not give each of {len(embeddings)} models one of {clusters} clusters, none empty",
            where="clustering.assignment", allowed=f"labels 0 to {clusters - 1}, each at least once",
            code="bad-clustering",
        )  # fmt: skip
    return sorted(np.flatnonzero(labels == label).tolist() for label in range(clusters))


def _fill_empty(labels: np.ndarray, distances: np.ndarray, clusters: int) -> None:
    """Equal embeddings can leave clusters empty: each takes the member of a larger one that lies farthest out."""
    for label in range(clusters):
        if not (labels == label).any():
            sizes = np.bincount(labels, minlength=clusters)
            own = distances[np.arange(len(labels)), labels]
            labels[np.where(sizes[labels] > 1, own, -1.0).argmax()] = label
