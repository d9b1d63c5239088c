"""What another package or program adds is found by its name, in configs and in the stages; anything else is refused."""

from __future__ import annotations

import importlib
import json
import linecache
import shutil
import sys
from collections.abc import Callable, Iterator
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

from deepfusion import pipeline, plugins
from deepfusion.config import explain, load_config
from deepfusion.errors import InputError
from deepfusion.families import base as families
from deepfusion.learning.distillation import Distiller
from deepfusion.models.loading import load_model
from deepfusion.models.presets import resolve
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
    plugins.register(group, "mine", plugins.load(group, known[0]))
    assert load_config(None, [f"{key}=mine"])
    assert plugins.KEYS[group] == key
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


# What others get wrong -----------------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Installs a package `tools` that declares one thing by an entry point."""

    def install(group: plugins.Group, points_to: str, source: str = "") -> None:
        (tmp_path / f"tools_{tmp_path.name}.py").write_text(source)
        info = tmp_path / "tools-1.0.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tools\nVersion: 1.0\n")
        module = points_to.replace("tools", f"tools_{tmp_path.name}", 1)
        (info / "entry_points.txt").write_text(f"[deepfusion.{group}]\nmine = {module}\n")
        monkeypatch.syspath_prepend(tmp_path)
        for cached in [plugins._declared]:
            cached.cache_clear()

    yield install
    monkeypatch.undo()
    for cached in [plugins._declared]:
        cached.cache_clear()
    sys.modules.pop(f"tools_{tmp_path.name}", None)


def refused(code: str, act: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        act()
    assert caught.value.code == code
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("group", list(plugins.KEYS))
@pytest.mark.parametrize(
    ("points_to", "source", "said"),
    [
        ("toolz:mine", "", "ModuleNotFoundError"),
        ("tools:other", "mine = 3", "AttributeError"),
        ("tools:mine", "1 / 0", "ZeroDivisionError: division by zero"),
        ("tools:mine", "import torch_of_tomorrow", "ModuleNotFoundError"),
        ("tools:mine", "mine = 3", "is no"),
        ("tools:mine", "class mine: weights = combine = fits = settings = name = config_class = None", "is no object"),
    ],
)  # fmt: skip
def test_what_cannot_be_loaded_is_refused_before_any_work(
    package: Any, group: plugins.Group, points_to: str, source: str, said: str, tmp_path: Path
) -> None:
    if said == "is no object" and group in ("methods", "clusterings"):
        return  # there a class is what is wanted
    package(group, points_to, source)
    config = load_config(None, [f"{plugins.KEYS[group]}=mine"])
    line = refused("plugin-broken", lambda: pipeline.run(config, tmp_path / "run"))
    assert line.startswith(f"{plugins.KEYS[group]}: mine, of the package tools, ")
    assert said in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("def mine(embeddings, clusters, config): 1 / 0", "plugin-failed"),
        ("def mine(embeddings): return [0, 1]", "plugin-failed"),
        ("def mine(embeddings, clusters, config): return [[0], [1, 2]]", "bad-clustering"),
        ("def mine(embeddings, clusters, config): return 3", "bad-clustering"),
        ("def mine(embeddings, clusters, config): return None", "bad-clustering"),
        ("def mine(embeddings, clusters, config): return ['a', 'b', 'a', 'b']", "bad-clustering"),
    ],
)
def test_a_clustering_that_fails_is_said_to(package: Any, tmp_path: Path, body: str, code: str) -> None:
    package("clusterings", "tools:mine", body)
    entries = [test_cluster.entry(f"d{number}", test_cluster.near(0, number)) for number in range(4)]
    line = refused(
        code, lambda: test_cluster.run(tmp_path, entries, experts=2, clustering={"assignment": "mine"})
    )
    assert line.startswith("clustering.assignment: ")
    assert code == "bad-clustering" or f"tools_{tmp_path.name}.mine failed: " in line


AVERAGE = """
import torch
from deepfusion.stages.proxy import Average
from deepfusion.models.checkpoints import mean_of
def weights(entries): {weights}
def combine(tensors, weights, dtype): {combine}
mine = Average(weights, {rule})
"""


@pytest.mark.parametrize(
    ("weights", "combine", "code"),
    [
        ("return [1.0]", None, "bad-average"),
        ("return [0.0, 0.0]", None, "bad-average"),
        ("return [1.0, float('nan')]", None, "bad-average"),
        ("return [2.0, -1.0]", None, "bad-average"),
        ("return None", None, "bad-average"),
        ("return entries[0].no_such_thing", None, "plugin-failed"),
        ("return [1.0, 1.0]", "return next(iter(tensors))[:1]", "bad-average"),
        ("return [1.0, 1.0]", "return next(iter(tensors)) * float('nan')", "bad-average"),
        ("return [1.0, 1.0]", "return 3", "bad-average"),
        ("return [1.0, 1.0]", "raise KeyError('x')", "plugin-failed"),
    ],
)
def test_an_average_that_is_none_is_refused(
    package: Any, tmp_path: Path, weights: str, combine: str | None, code: str
) -> None:
    rule = "combine" if combine else "mean_of"
    source = AVERAGE.format(weights=weights, combine=combine or "pass", rule=rule)
    package("averages", "tools:mine", source)
    for seed in range(2):
        save_upload(tmp_path / "uploads" / f"d{seed}", seed=seed)
    line = refused(code, lambda: test_proxy.run(tmp_path, [["d0", "d1"]], ["tiny"], "mine"))
    assert line.startswith("clustering.average: ")


def test_an_error_of_ours_is_not_blamed_on_others() -> None:
    for found in (Distiller, test_cluster.near):
        with pytest.raises(ZeroDivisionError), plugins.blamed("methods", found):
            1 / 0  # noqa: B018


def test_a_name_that_two_packages_declare_is_refused_where_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "tools-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tools\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[deepfusion.clusterings]\nkmeans = tools:kmeans\n")
    monkeypatch.syspath_prepend(tmp_path)
    for cached in [plugins._declared]:
        cached.cache_clear()
    try:
        line = refused("plugin-broken", lambda: plugins.load("clusterings", "kmeans"))
        assert "is declared by several packages (deepfusion, tools)" in line
        assert plugins.load("clusterings", "random")
    finally:
        for cached in [plugins._declared]:
            cached.cache_clear()


def test_a_family_that_cannot_be_loaded_stops_nobody_who_does_not_name_it(package: Any) -> None:
    package("families", "tools:mine", "1 / 0")
    config = load_model(resolve("tiny-qwen3")).config
    assert families.of(config) is None
    assert families.get("qwen3_moe").name == "qwen3_moe"
    refused("plugin-broken", lambda: families.get("mine"))


def test_what_is_bound_to_ours_counts_too() -> None:
    assert plugins.is_ours(partial(Distiller, 3))
    assert not plugins.is_ours(partial(Distiller, test_cluster.near))
    assert plugins.is_ours(Average(plugins.load("averages", "uniform").weights))
    assert not plugins.is_ours(Average(test_cluster.near))
    assert not plugins.is_ours(Average(partial(test_cluster.near, 3)))
    assert " " in plugins.version(partial(Distiller, test_cluster.near))


def test_a_change_of_own_code_is_another_version(package: Any, tmp_path: Path) -> None:
    found = []
    for body in ("return [0, 1]", "return [1, 0]"):
        package("clusterings", "tools:mine", f"def mine(embeddings, clusters, config): {body}")
        sys.modules.pop(f"tools_{tmp_path.name}", None)
        importlib.invalidate_caches()
        linecache.clearcache()
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        found.append(plugins.version(plugins.load("clusterings", "mine")))
    assert found[0] != found[1]
    assert all(one.startswith(f"tools_{tmp_path.name}.mine ") for one in found)
    assert plugins.version(Distiller) == plugins.qualified_name(Distiller)
