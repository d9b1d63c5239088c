"""The config: layers, overrides, digests, and errors that name key and remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from deepfusion.config import (
    CONFIGS,
    RECIPES,
    Config,
    config_digest,
    explain,
    known_keys,
    load_config,
    parse_config,
    save_config,
)
from deepfusion.errors import InputError

ROOT = Path(__file__).parents[2]
SHIPPED = sorted(CONFIGS.rglob("*.yaml"))


def written(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text, "utf-8")
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_shipped_configs_load(path):
    assert isinstance(load_config(path), Config)


def test_quickstart_is_the_default():
    assert load_config() == load_config(CONFIGS / "quickstart.yaml")


def test_round_trip_of_the_resolved_config(tmp_path):
    config = load_config(overrides=["recipe=paper", "data.test=0.2", "device.learning_rate=1e-3"])
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


def test_defaults_then_recipe_then_file_then_overrides(tmp_path):
    file = written(tmp_path, "recipe: fused\ntune: {train_experts: false}\n")
    config = load_config(file)
    assert config.tune.teachers is RECIPES["fused"]["tune"]["teachers"] is True
    assert config.tune.train_experts is False
    assert config.tune.steps == Config().tune.steps
    assert load_config(file, ["tune.train_experts=true"]).tune.train_experts is True
    assert load_config(file, ["recipe=paper"]).tune.teachers is False
    assert load_config(file, ["recipe=paper"]).distill.trunk_share == 0


def test_nothing_is_handed_over_where_one_of_two_trainings_is_left_out(tmp_path):
    """The rate must fall to nothing at the end of all training, and start at its peak."""
    assert load_config(overrides=["distill.handover=0.4"]).distill.handover == 0.4
    for alone in ("tune.steps=0", "distill.steps=0"):
        config = load_config(overrides=[alone, "distill.handover=0.4"])
        assert config.distill.handover == 0
        save_config(config, tmp_path / "saved.yaml")
        assert load_config(tmp_path / "saved.yaml") == config


@pytest.mark.parametrize("apart", ["distill.trunk_share=0.5", "merge.router=prototype", "recipe=paper"])
def test_each_base_has_one_proxy_where_it_learns_anything_of_its_own(apart):
    assert load_config(overrides=["clustering.proxies=9"]).clustering.proxies == 9
    assert load_config(overrides=["clustering.proxies=9", apart]).clustering.proxies is None


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("seed=3", "seed", 3),
        ("data.public=[sampled, a.jsonl]", "data.public", ["sampled", "a.jsonl"]),
        ("device.learning_rate=1e-3", "device.learning_rate", 1e-3),
        ("data.test=held.jsonl", "data.test", "held.jsonl"),
        ("distill.base=null", "distill.base", None),
        ("distill.base=a=b", "distill.base", "a=b"),
        (
            "devices=[{type: gpt2}]",
            "devices",
            [{"id": None, "type": "gpt2", "data": None, "method": None, "memory": None}],
        ),
    ],
)
def test_override(override, key, value):
    found = load_config(overrides=[override]).model_dump()
    for part in key.split("."):
        found = found[part]
    assert found == value


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("sed: 1", "unknown-key", ["sed", "did you mean seed?"]),
        ("tune: {stpes: 1}", "unknown-key", ["tune.stpes", "did you mean tune.steps?"]),
        ("stages: 3", "unknown-key", ["stages", "distill.vaa.stages"]),
        ("devices: [{typ: gpt2}]", "unknown-key", ["devices.0.typ", "did you mean devices.type?"]),
        ("distil: {steps: 3}", "unknown-key", ["did you mean distill?"]),
        ("learning_rate: 3", "unknown-key", [".learning_rate?"]),
        ("frobnicate: 3", "unknown-key", ["config explain"]),
        ("seed: -1", "bad-value", ["seed", "got -1"]),
        ("seed: some", "bad-value", ["seed", "got 'some'"]),
        ("data: {public: []}", "bad-value", ["data.public"]),
        ("data: {test: 1.5}", "bad-value", ["data.test"]),
        ("tune: 3", "bad-value", ["tune"]),
        ("experts: 2\ntop_k: 3", "bad-value", ["top_k=3", "experts=2"]),
        ("top_k: 1", "bad-value", ["router no gradient"]),
        ("devices: [{id: a, type: x}, {id: a, type: y}]", "bad-value", ["a stands twice"]),
        ("devices: [{id: ' ', type: x}]", "bad-value", ["devices.0.id"]),
        ("distill: {vaa: {patches: 5, stages: 2}}", "bad-value", ["patches"]),
        ("[1, 2]", "bad-yaml", ["mapping"]),
        ("a: [", "bad-yaml", ["not valid YAML"]),
        ("!!python/object/apply:os.system ['true']", "bad-yaml", ["not valid YAML"]),
    ],
)
def test_errors_name_file_key_and_remedy(tmp_path, text, code, words):
    file = written(tmp_path, text)
    with pytest.raises(InputError) as caught:
        load_config(file)
    assert caught.value.code == code
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("override", ["seed", "=3", "seed=[", "seed.deep=1", "recipe=[a]"])
def test_bad_overrides(override):
    with pytest.raises(InputError):
        load_config(overrides=[override])


def test_one_expert_needs_no_router():
    assert parse_config({"experts": 1, "top_k": 1}).top_k == 1
    assert parse_config({"top_k": 1, "tune": {"steps": 0}}).top_k == 1
    assert parse_config({"top_k": 1, "merge": {"split": 2}}).merge.split == 2


def test_digest_covers_what_it_names():
    a, b = parse_config({"tune": {"steps": 1}}), parse_config({"tune": {"steps": 2}})
    assert config_digest(a) != config_digest(b)
    assert config_digest(a, "tune") != config_digest(b, "tune")
    assert config_digest(a, "tune.batch_size", "seed", "distill") == config_digest(
        b, "tune.batch_size", "seed", "distill"
    )


def test_every_key_is_explained_and_can_be_set():
    config = Config().model_dump()
    for key, kind, default, meaning in explain():
        assert meaning, f"{key} has no description"
        assert kind
        value = config
        for part in key.split("."):
            value = value[part]
        if key.split(".")[0] not in RECIPES["fused"]:
            assert default == value
    assert len(set(known_keys())) == len(known_keys()) > 60


KEYS = st.sampled_from(["seed", "data", "tune", "type", "id", "x"])
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=8
)


def parsed(values: object) -> Config | InputError:
    try:
        return parse_config(values if isinstance(values, dict) else {"devices": values})
    except InputError as error:
        return error


@given(VALUES)
def test_any_values_end_in_a_config_or_one_line(values):
    found = parsed(values)
    if isinstance(found, Config):
        plain = found.model_dump(mode="json")
        assert parse_config(yaml.safe_load(yaml.safe_dump(plain))) == found
    else:
        assert len(str(found).splitlines()) == 1
        assert len(str(found)) < 1000


@pytest.mark.parametrize(
    "name",
    [
        "a #1.jsonl",
        "*.jsonl",
        "notes: ward.jsonl",
        "a: b",
        "&x",
        "%y",
        "@z",
        "- a",
        "2024-01-01",
        "!x",
        "|",
        "x # y",
        "a=b",
    ],
)
def test_the_value_of_an_override_is_what_was_typed(name: str) -> None:
    assert load_config(None, [f"data.private={name}"]).data.private == name
    assert load_config(None, [f"data.private='{name}'"]).data.private == name
    assert load_config(None, [f"data.private=['{name}', b]"]).data.private == [name, "b"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("device.steps=0", r"\[--set device.steps=0\]|--set device.steps=0"),
        ("data.partition={scheme: none}", "--set data.partition="),
        ("data.private=[a #1.jsonl]", "quote"),
    ],
)
def test_an_error_names_the_override_that_caused_it(override: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        load_config(None, ["seed=3", override])
    assert "quickstart.yaml" not in str(error.value)
