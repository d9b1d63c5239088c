"""Deal documents to simulated devices, by domain or at random, in uneven sizes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Literal

import numpy as np

from deepfusion.errors import InputError
from deepfusion.text.rows import Document

Scheme = Literal["by_domain", "random_uneven", "dirichlet"]


def partition(
    documents: Sequence[Document], devices: int, scheme: Scheme, alpha: float, seed: int, *, least: int = 1
) -> list[list[Document]]:
    """Give every document to exactly one device.

    Args:
        scheme: random_uneven deals shuffled documents in Dirichlet(alpha) sizes; by_domain gives domains to devices in
            proportion, in uneven sizes (domains too many or too small for a device of their own join the device with
            the fewest documents); dirichlet draws for each domain how it spreads over the devices.
        least: documents of every device, or the mean where that is less.

    Raises:
        InputError: fewer documents than devices.
    """
    if len(documents) < devices:
        what = f"{len(documents)} documents for {devices} devices"
        raise InputError(what, fix="fewer devices", code="too-few-documents")
    generator = np.random.default_rng(seed)
    least = min(least, len(documents) // devices)
    order = generator.permutation(len(documents)).tolist()
    domains: dict[str, list[int]] = defaultdict(list)
    for index in order:
        domains[documents[index].domain].append(index)
    groups = [domains[domain] for domain in sorted(domains)]
    if scheme == "random_uneven":
        parts = _cut(order, _uneven_sizes(len(order), devices, alpha, least, generator))
    elif scheme == "dirichlet":
        cuts = [_cut(group, _uneven_sizes(len(group), devices, alpha, 0, generator)) for group in groups]
        parts = [[index for cut in cuts for index in cut[device]] for device in range(devices)]
    else:
        parts = _by_domain(groups, devices, alpha, least, generator)
    while min(map(len, parts)) < least:
        min(parts, key=len).append(max(parts, key=len).pop())
    return [[documents[index] for index in sorted(part)] for part in parts]


def _by_domain(
    groups: list[list[int]], devices: int, alpha: float, least: int, generator: np.random.Generator
) -> list[list[int]]:
    groups = sorted(groups, key=len, reverse=True)
    large = [group for group in groups if len(group) >= least][:devices] or groups[:devices]
    # Largest remainder, each domain at least one device.
    exact = np.array([len(group) for group in large]) * devices / sum(map(len, large))
    seats = np.maximum(1, np.floor(exact)).astype(int)
    while seats.sum() != devices:
        step = 1 if seats.sum() < devices else -1
        seats[np.argmax(np.where((step < 0) & (seats == 1), -np.inf, step * (exact - seats)))] += step
    parts = []
    for group, count in zip(large, seats.tolist(), strict=True):
        parts += _cut(group, _uneven_sizes(len(group), count, alpha, least, generator))
    for group in groups[len(large) :]:
        min(parts, key=len).extend(group)
    return parts


def _uneven_sizes(
    total: int, parts: int, alpha: float, least: int, generator: np.random.Generator
) -> list[int]:
    """Sizes that add up to `total`: `least` each (the mean where that is less) and the rest by Dirichlet(alpha)."""
    least = min(least, total // parts)
    return (
        least + generator.multinomial(total - least * parts, generator.dirichlet([alpha] * parts))
    ).tolist()


def _cut(items: list[int], sizes: list[int]) -> list[list[int]]:
    ends = np.cumsum(sizes).tolist()
    return [items[end - size : end] for end, size in zip(ends, sizes, strict=True)]
