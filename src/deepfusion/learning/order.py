"""In which order a training reads its documents, and for how many steps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deepfusion.errors import InputError

POOL = 16  # batches among which documents are sorted by length


def training_steps(steps: int, epochs: float | None, documents: int, batch_size: int) -> int:
    """Optimizer steps of a training that may pass at most `epochs` times over its documents; at least one."""
    return steps if epochs is None else max(1, min(steps, round(epochs * documents / batch_size)))


def reading_order(
    lengths: Sequence[int], steps: int, batch_size: int, seed: int, every: Sequence[int] | None = None
) -> list[list[int]]:
    """The documents of each batch of a training: `steps` lists of `batch_size` indexes into `lengths`.

    Epoch after epoch in seeded random order, so that the counts of any two documents differ by one at most. Documents
    of similar length share a batch to save padding (sorted within pools of 16 batches, the batches of a pool shuffled).

    Args:
        every: document i stands in every `every[i]`-th epoch; default 1 for all.
    """
    if not lengths:
        raise InputError("there are no documents to train on", code="no-data")
    generator = np.random.default_rng(seed)
    total = steps * batch_size
    stream: list[int] = []
    ends: list[int] = []
    while len(stream) < total:
        order = generator.permutation(len(lengths)).tolist()
        stream += (
            order if every is None else [index for index in order if (index + len(ends)) % every[index] == 0]
        )
        ends.append(len(stream))
    batches: list[list[int]] = []
    start = 0
    while start < total:
        # A pool ends with its epoch, or a document would often stand twice in one batch.
        epoch_end = next(end for end in ends if end > start)
        end = min(start + POOL * batch_size, -(-epoch_end // batch_size) * batch_size, total)
        pool = sorted(stream[start:end], key=lambda index: lengths[index])
        cut = [pool[at : at + batch_size] for at in range(0, len(pool), batch_size)]
        batches += [cut[index] for index in generator.permutation(len(cut))]
        start = end
    return batches
