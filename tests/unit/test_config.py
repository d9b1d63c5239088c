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
    RENAMED,
    config_digest,
    explain,
    known_keys,
    load_config,
    parse_config,
    save_config,
)
from deepfusion.errors import InputError
from deepfusion.schema import _IDLE, Config, effective_handover

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
    assert effective_handover(load_config(overrides=["distill.handover=0.4"])) == 0.4
    assert effective_handover(load_config()) == load_config().distill.handover == 0.3
    for alone in ("tune.steps=0", "distill.steps=0"):
        config = load_config(overrides=[alone])
        assert (effective_handover(config), config.distill.handover) == (0, 0.3)
        assert config_digest(config, "distill") == config_digest(
            load_config(overrides=[alone, "distill.handover=0"]), "distill"
        )
        save_config(config, tmp_path / "saved.yaml")
        assert load_config(tmp_path / "saved.yaml") == config


def test_of_experts_and_top_k_the_one_that_nobody_has_set_gives_way():
    assert (load_config().experts, load_config().top_k) == (4, 2)
    more = parse_config({"top_k": 6})
    assert (more.experts, "experts" in more.model_fields_set) == (6, False)
    assert parse_config({"experts": 1}).top_k == 1
    assert (Config(top_k=6).experts, Config(experts=1).top_k) == (6, 1)


CONTRADICTIONS = [
    (["tune.steps=0", "distill.handover=0.7"], "distill.handover=0.7", "--set distill.handover=0"),
    (["distill.steps=0", "distill.handover=0.7"], "distill.steps is 0", "--set distill.handover=0"),
    (["recipe=paper", "clustering.proxies=16"], "trunk_share is 0", "--set clustering.proxies=null"),
    (
        ["distill.trunk_share=0.5", "clustering.proxies=9"],
        "trunk_share is 0.5",
        "--set clustering.proxies=null",
    ),
    (["merge.router=prototype", "clustering.proxies=9"], "prototype", "--set clustering.proxies=null"),
    (["recipe=paper", "tune.ce_weight=0.5"], "tune.teachers is false", "--set tune.ce_weight=1"),
    (["tune.teachers=false", "tune.beta=3"], "tune.beta=3", "--set tune.beta=1"),
    (["tune.teachers=false", "tune.chunk_weight=0"], "tune.chunk_weight=0", "--set tune.chunk_weight=0.1"),
    (["data.partition.scheme=dirichlet"], "every device names its own data", "random_uneven"),
    (
        ["devices=null", "data.private=a.jsonl", "data.partition.scheme=by_domain"],
        "each file is one",
        "random_uneven",
    ),
]


WITHOUT_EFFECT = [
    (["tune.steps=0", "tune.learning_rate=0.1"], "tune.steps is 0"),
    (["distill.steps=0", "distill.alpha=2"], "distill.steps is 0"),
    (["distill.train=all"], "distill.trunk_share is 1"),
    (["distill.alpha=0", "distill.vaa.width=128"], "distill.alpha is 0"),
    (["distill.beta=0", "distill.chunk_weight=0", "distill.temperature=2"], "distill.beta and"),
    (["data.public=[in_domain]", "data.sampled_documents=7"], "does not name sampled"),
    (["data.generic_documents=7"], "does not name generic"),
    (["data.public=[sampled]", "data.public_fraction=0.2"], "does not name in_domain"),
    (["device.lora_rank=3"], "every device trains all its weights"),
    (["device.types=[tiny-gpt2]"], "each of the devices has a type"),
    (
        [
            "devices=[{type: tiny-gpt2, method: full, data: a.jsonl}]",
            "experts=1",
            "top_k=1",
            "device.method=lora",
        ],
        "each of the devices has a method",
    ),
    (["clustering.assignment=random", "clustering.restarts=3"], "not kmeans"),
    (["federation.s3.bucket=b"], "federation.sink is not s3"),
]


@pytest.mark.parametrize(("overrides", "why"), WITHOUT_EFFECT, ids=str)
def test_what_nothing_reads_is_refused(overrides, why):
    with pytest.raises(InputError) as caught:
        load_config(overrides=overrides)
    error = caught.value
    assert (error.code, error.where) == ("contradiction", f"--set {overrides[-1]}")
    assert error.what.startswith(f"{overrides[-1].partition('=')[0]} has no effect: ")
    assert why in error.what
    assert load_config(overrides=overrides[:-1])
    assert load_config(overrides=overrides, for_many=True)


def test_keys_that_may_be_without_effect_are_keys():
    named = {key for keys, *_ in _IDLE for key in keys}
    known = set(known_keys())
    assert {key for key in named if not any(f"{one}.".startswith(f"{key}.") for one in known)} == set()


IMPOSSIBLE = [
    (["clustering.proxies=2"], "fewer than experts=4"),
    (["recipe=paper", "distill.steps=3"], "leaves 3 steps for experts=4 bases"),
    (["distill.trunk_share=0.9", "distill.steps=10"], "leaves 1 steps"),
    (["distill.vaa.heads=3"], "distill.vaa.width must be a multiple of distill.vaa.heads"),
]


@pytest.mark.parametrize(("overrides", "what"), IMPOSSIBLE, ids=str)
def test_what_cannot_be_is_refused_before_any_work(overrides, what):
    with pytest.raises(InputError, match=what):
        load_config(overrides=overrides)


def test_an_upload_of_changes_goes_with_devices_that_all_say_full():
    devices = "devices=[{type: tiny-gpt2, method: full, data: a.jsonl}]"
    given = [devices, "experts=1", "top_k=1", "device.upload=delta8"]
    assert load_config(overrides=given).device.upload == "delta8"


@pytest.mark.parametrize(("overrides", "what", "fix"), CONTRADICTIONS, ids=str)
def test_what_would_be_ignored_is_refused(overrides, what, fix):
    with pytest.raises(InputError) as caught:
        load_config(overrides=overrides)
    error = caught.value
    assert error.code == "contradiction"
    assert error.where == " ".join(f"--set {override}" for override in overrides)
    assert what in error.what
    assert fix in str(error.fix)
    if str(error.fix).startswith("--set "):
        load_config(overrides=[*overrides, str(error.fix).removeprefix("--set ")])


def test_a_contradiction_within_a_file_names_the_file(tmp_path):
    file = written(tmp_path, "recipe: paper\nclustering: {proxies: 9}\n")
    with pytest.raises(InputError, match=r"proxies=9.*\[contradiction\]") as caught:
        load_config(file)
    assert caught.value.where == file


def test_what_changes_nothing_is_no_contradiction():
    same = ["recipe=paper", "clustering.proxies=4", "tune.beta=1", "tune.ce_weight=1"]
    assert load_config(overrides=same).clustering.proxies == 4
    assert load_config(overrides=["tune.steps=0", "distill.handover=0.3"]).distill.handover == 0.3
    assert load_config(overrides=["devices=8", "data.partition.scheme=dirichlet"]).devices == 8


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_shipped_configs_are_the_same_after_a_round_trip(path, tmp_path):
    config = load_config(path)
    save_config(config, tmp_path / "saved.yaml")
    again = load_config(tmp_path / "saved.yaml")
    assert again == config
    assert config_digest(again) == config_digest(config)


VALID = {
    "seed": st.integers(0, 2**31 - 1),
    "recipe": st.sampled_from(["paper", "fused"]),
    "experts": st.integers(1, 9),
    "top_k": st.integers(1, 9),
    "jobs": st.none() | st.integers(1, 4),
    "devices": st.none()
    | st.integers(1, 9)
    | st.just([{"type": "tiny-gpt2", "data": "a #1.jsonl"}, {"type": "x"}]),
    "data.private": st.text(max_size=8) | st.lists(st.text(max_size=8), max_size=3),
    "data.test": st.floats(0.01, 0.9) | st.text(max_size=8),
    "data.partition.scheme": st.sampled_from(["by_domain", "random_uneven", "dirichlet"]),
    "clustering.proxies": st.none() | st.integers(1, 20),
    "distill.steps": st.integers(0, 3),
    "distill.handover": st.floats(0, 1),
    "distill.trunk_share": st.floats(0, 1),
    "tune.steps": st.integers(0, 3),
    "tune.beta": st.floats(0, 9),
    "tune.teachers": st.booleans(),
    "merge.split": st.integers(1, 2),
    "merge.router": st.sampled_from(["random", "prototype"]),
}


@given(st.fixed_dictionaries({}, optional=VALID))
def test_configs_are_the_same_after_a_round_trip(tmp_path_factory, values):
    folder = tmp_path_factory.mktemp("round")
    nested: dict = {}
    for key, value in values.items():
        *sections, last = key.split(".")
        holder = nested
        for section in sections:
            holder = holder.setdefault(section, {})
        holder[last] = value
    try:
        config = load_config(written(folder, yaml.safe_dump(nested, allow_unicode=True)))
    except InputError:
        return  # they contradict each other
    for key, value in values.items():  # the config keeps what was said
        found = config.model_dump(mode="json", exclude_unset=True)
        for part in key.split("."):
            found = found[part]
        assert found == value
    save_config(config, folder / "saved.yaml")
    assert load_config(folder / "saved.yaml") == config


RENAMINGS = {"tune.moe_steps": "tune.steps", "shape": "merge", "top": "top_k"}


def test_an_old_name_is_accepted_with_a_warning(tmp_path, capsys):
    file = written(tmp_path, "top: 3\nshape: {split: 2}\ntune: {moe_steps: 7, batch_size: 3}\n")
    config = load_config(file, ["shape.router=prototype"], renamed=RENAMINGS)
    new = written(
        tmp_path, "top_k: 3\nmerge: {split: 2, router: prototype}\ntune: {steps: 7, batch_size: 3}\n"
    )
    told = capsys.readouterr().err.splitlines()
    assert config == load_config(new)
    assert sorted(line.split(": ")[1].split(";")[0] for line in told) == [
        "shape is now called merge",
        "shape is now called merge",
        "top is now called top_k",
        "tune.moe_steps is now called tune.steps",
    ]
    assert told[-1].startswith("--set shape.router=prototype: ")
    assert all(str(file) in line for line in told[:-1])
    assert capsys.readouterr().err == ""


def test_an_old_name_beside_the_new_one_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"tune.moe_steps and tune.steps are one key.*\[contradiction\]"):
        load_config(written(tmp_path, "tune: {moe_steps: 7, steps: 8}\n"), renamed=RENAMINGS)
    over = load_config(written(tmp_path, "tune: {moe_steps: 7}\n"), ["tune.steps=8"], renamed=RENAMINGS)
    assert over.tune.steps == 8


def test_an_error_below_an_old_name_says_the_new_one(tmp_path):
    with pytest.raises(InputError, match=r"^--set tune.steps=-1: tune.steps: "):
        load_config(overrides=["tune.moe_steps=-1"], renamed=RENAMINGS)


def test_renamed_keys_are_known_and_listed_for_users():
    """Nothing renamed may still exist by its old name, and RELEASE.md tells of each."""
    text = (ROOT / "RELEASE.md").read_text("utf-8")
    sections = {key.rpartition(".")[0] for key in known_keys()}
    for old, new in RENAMED.items():
        assert new in sections | set(known_keys())
        assert old not in sections | set(known_keys())
        assert f"| `{old}` | `{new}` |" in text


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_shipped_configs_use_no_old_name(path, capsys):
    load_config(path)
    assert capsys.readouterr().err == ""


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
        ("blocks: 3", "unknown-key", ["blocks", "distill.vaa.blocks"]),
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
        ("distill: {vaa: {patches: 5, blocks: 2}}", "bad-value", ["patches"]),
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
        ("top_k=5", "--set top_k=5: top_k=5 is more than experts=4"),
        ("top_k=1", "^--set top_k=1: top_k=1 gives"),
        ("devices=0", "^--set devices=0: "),
    ],
)
def test_an_error_names_the_override_that_caused_it(override: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        load_config(None, ["seed=3", override])
    assert "quickstart.yaml" not in str(error.value)


def test_a_packaged_config_gives_way_to_what_is_set() -> None:
    path = CONFIGS / "fuse.yaml"
    assert load_config(path).clustering.proxies == 16
    assert load_config(path, ["recipe=paper"]).clustering.proxies is None
    with pytest.raises(InputError, match="contradiction"):
        load_config(path, ["recipe=paper", "clustering.proxies=16"])
