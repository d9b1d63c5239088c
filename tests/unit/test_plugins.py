"""What another package or program adds is found by its name, in configs and in the stages; anything else is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_cluster
import test_proxy
import torch
from device_models import save_upload
from safetensors.torch import load_file

from deepfusion import plugins
from deepfusion.config import explain, load_config
from deepfusion.errors import InputError
from deepfusion.learning.distillation import Distiller
from deepfusion.stages.proxy import Average


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    before = dict(plugins._registered)
    yield
    plugins._registered.clear()
    plugins._registered.update(before)


@pytest.mark.parametrize(
    ("group", "key"),
    [
        ("clusterings", "clustering.assignment"),
        ("averages", "clustering.average"),
        ("methods", "distill.method"),
    ],
)
def test_a_name_is_known_once_it_is_registered(group: plugins.Group, key: str) -> None:
    known = plugins.names(group)
    with pytest.raises(InputError, match=f"there is no 'mine' among {', '.join(known)}"):
        load_config(None, [f"{key}=mine"])
    plugins.register(group, "mine", object())
    assert load_config(None, [f"{key}=mine"])
    shown = {name: kind for name, kind, *_ in explain()}[key]
    assert shown == " | ".join(sorted([*known, "mine"]))


def test_a_near_name_is_offered() -> None:
    with pytest.raises(InputError, match=r"did you mean kmeans\?"):
        load_config(None, ["clustering.assignment=kmean"])


@pytest.mark.parametrize("name", ["", "a b", "module:attribute", "../x"])
def test_names_are_plain_words(name: str) -> None:
    with pytest.raises(ValueError, match="is no name"):
        plugins.register("methods", name, object())


def test_what_is_installed_cannot_be_replaced() -> None:
    with pytest.raises(ValueError, match="there already"):
        plugins.register("clusterings", "kmeans", object())


def clusters_of(folder: Path, labels: list[int]) -> dict[str, Any]:
    plugins.register("clusterings", "mine", lambda embeddings, clusters, config: np.array(labels))
    entries = [test_cluster.entry(f"d{number}", test_cluster.near(0, number)) for number in range(4)]
    return test_cluster.run(folder, entries, experts=2, clustering={"assignment": "mine"})


def test_an_own_clustering_decides(tmp_path: Path) -> None:
    found = clusters_of(tmp_path, [1, 0, 0, 1])
    assert [cluster["devices"] for cluster in found["clusters"]] == [["d0", "d3"], ["d1", "d2"]]


@pytest.mark.parametrize("labels", [[0, 0, 0, 0], [0, 1, 2, 0], [0, 1], [0, 1, -1, 0]])
def test_an_own_clustering_that_leaves_models_out_is_refused(tmp_path: Path, labels: list[int]) -> None:
    with pytest.raises(InputError, match="bad-clustering"):
        clusters_of(tmp_path, labels)


def test_an_own_average_decides(tmp_path: Path) -> None:
    def median(tensors: Any, weights: list[float], dtype: torch.dtype) -> torch.Tensor:
        return torch.stack([tensor.float() for tensor in tensors]).median(0).values.to(dtype)

    plugins.register("averages", "median", Average(lambda entries: [1.0] * len(entries), median))
    names = ["d0", "d1", "d2"]
    for seed, name in enumerate(names):
        save_upload(tmp_path / "uploads" / name, seed=seed)
    mean = load_file(test_proxy.run(tmp_path, [names], ["tiny"], "median") / "0" / "model.safetensors")
    members = [load_file(tmp_path / "uploads" / name / "model.safetensors") for name in names]
    for name, tensor in mean.items():
        assert torch.equal(tensor, torch.stack([member[name] for member in members]).median(0).values)


def test_names_of_what_runs_say_where_it_is_from() -> None:
    assert plugins.qualified_name(Distiller) == "deepfusion.learning.distillation.Distiller"
    found = plugins.qualified_name(plugins.load("averages", "uniform"))
    assert (
        found
        == "deepfusion.stages.proxy.Average(deepfusion.stages.proxy._alike, deepfusion.models.checkpoints.mean_of)"
    )
    assert plugins.qualified_name(partial(Distiller, 3)) == "deepfusion.learning.distillation.Distiller(3)"
    assert plugins.load("methods", "vaa") is Distiller
    assert json.loads(json.dumps(plugins.names("averages"))) == ["tokens", "uniform"]
