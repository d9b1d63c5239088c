"""Families: K equal bases compute the base's function in every family and layout; counts and exports are exact."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from deepfusion import plugins
from deepfusion.config import load_config
from deepfusion.errors import InputError
from deepfusion.families.base import (
    Family,
    MoELayout,
    check_base,
    check_family,
    expert_parameters,
    get,
    is_expert_name,
    merge_tensors,
    moe_config,
    names,
    of,
    parameter_count,
    pinned_parameters,
    router_logits_by_layer,
)
from deepfusion.families.deepseek import export_deepseek_v1
from deepfusion.models.checkpoints import TensorReader, TensorWriter

# A Qwen2Moe without shared experts has empty weights, which torch remarks on.
pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
}
MLA = {"q_lora_rank": None, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8}
K = 3
FAMILIES = names()
LAYOUTS = [  # shared, split, top_k, dense layers
    ("none", 1, 1, ()),
    ("none", 2, 2, ()),
    ("none", 4, 2, (0,)),
    ("zero", 2, 1, ()),
    ("average", 1, 2, (0,)),
    ("average", 2, 2, ()),
    ("average", 4, 3, ()),
]


def base_config(family: str, **changes: object) -> PretrainedConfig:
    sizes = {**SIZES, **changes}
    match family:
        case "qwen2_moe":
            return Qwen2Config(**{**sizes, "num_key_value_heads": 2})
        case "qwen3_moe":
            return Qwen3Config(**{**sizes, "num_key_value_heads": 2, "head_dim": 16})
        case "deepseek":
            return LlamaConfig(**sizes)
        case "mixtral":
            return MistralConfig(**{**sizes, "num_key_value_heads": 2}, sliding_window=None)
        case "deepseek_v2":
            return DeepseekV2Config(**sizes, **MLA, first_k_dense_replace=2)
        case _:
            return DeepseekV3Config(**sizes, **MLA, first_k_dense_replace=2)


def random_base(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A base with weights large enough for every part to show in the logits."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(
                1 + 0.2 * torch.randn_like(parameter) if "norm" in name else 0.1 * torch.randn_like(parameter)
            )
    return model


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Per family: K different saved bases."""
    root = tmp_path_factory.mktemp("bases")
    found = {}
    for family in FAMILIES:
        models = [random_base(base_config(family), seed) for seed in range(K)]
        for number, model in enumerate(models):
            model.save_pretrained(root / family / str(number))
        found[family] = models, [root / family / str(number) for number in range(K)]
    return found


def merge(
    layout: MoELayout, folders: list[Path], config: PretrainedConfig, out: Path, router=None
) -> PreTrainedModel:
    with TensorWriter(out) as writer:
        for name, tensor in merge_tensors(
            layout, [TensorReader(folder) for folder in folders], config, router
        ):
            writer.add(name, tensor)
    moe_config(config, layout).save_pretrained(out)
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def tokens(seed: int = 0, shape: tuple[int, int] = (2, 24)) -> torch.Tensor:
    return torch.randint(0, 64, shape, generator=torch.Generator().manual_seed(seed))


def first(family: str) -> tuple[int, ...]:
    """The first layer, where a family can have dense ones."""
    return () if get(family).leading_dense is False else (0,)


def layouts(family: str) -> list[MoELayout]:
    return [
        MoELayout(family, K, top_k, split, shared, dense)
        for shared, split, top_k, dense in LAYOUTS
        if (get(family).shared_experts or shared == "none")
        and (get(family).leading_dense is not False or not dense)
    ]


@pytest.mark.parametrize("prototype", [False, True], ids=["random", "prototype"])
@pytest.mark.parametrize("layout", [layout for family in FAMILIES for layout in layouts(family)], ids=str)
def test_equal_bases_keep_their_function(bases, tmp_path, layout, prototype):
    models, folders = bases[layout.family]
    router = (
        F.normalize(torch.randn(2, K, 32, generator=torch.Generator().manual_seed(3)), dim=-1)
        if prototype
        else None
    )
    moe = merge(layout, [folders[0]] * K, models[0].config, tmp_path, router)
    with torch.no_grad():
        expected, got = models[0](tokens()).logits, moe(tokens()).logits
    assert (expected - got).abs().max() < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_different_bases_change_the_function_by_far_more_than_the_tolerance(bases, tmp_path, family):
    models, _ = bases[family]
    states = [dict(model.state_dict()) for model in models]
    for number, state in enumerate(states):  # base 0 with the FFNs of the others: only the experts differ
        mixed = {name: state[name] if ".mlp." in name else states[0][name] for name in state}
        models[0].save_pretrained(tmp_path / str(number), state_dict=mixed)
    mixed_folders = [tmp_path / str(number) for number in range(K)]
    moe = merge(MoELayout(family, K, 2, split=2), mixed_folders, models[0].config, tmp_path / "moe")
    with torch.no_grad():
        assert (moe(tokens()).logits - models[0](tokens()).logits).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_names_shapes_and_dtypes_are_those_of_save_pretrained(bases, tmp_path, family):
    models, folders = bases[family]
    for number, layout in enumerate(layouts(family)[:3]):
        merged, again = tmp_path / str(number), tmp_path / f"{number}-again"
        merge(layout, folders, models[0].config, merged).save_pretrained(again)
        ours, theirs = TensorReader(merged), TensorReader(again)
        assert ours.names() == theirs.names()
        for name in ours.names():
            assert (ours.shape(name), ours.dtype(name)) == (theirs.shape(name), theirs.dtype(name))
            assert torch.equal(ours.get(name), theirs.get(name))


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_copies_and_the_rest_is_the_mean(bases, family):
    models, folders = bases[family]
    readers = [TensorReader(folder) for folder in folders]
    merged = dict(merge_tensors(MoELayout(family, K, 2), readers, models[0].config, None))
    states = [model.state_dict() for model in models]
    for name, tensor in merged.items():
        if is_expert_name(name):
            number = int(name.split(".experts.")[1].split(".")[0])
            own = name.replace(f"experts.{number}.", "").replace("block_sparse_moe", "mlp")
            for stored, usual in {"w1.": "gate_proj.", "w2.": "down_proj.", "w3.": "up_proj."}.items():
                own = own.replace(stored, usual)
            assert torch.equal(tensor, states[number][own])
        elif name in states[0]:
            torch.testing.assert_close(tensor, torch.stack([state[name] for state in states]).mean(0))
    assert any(is_expert_name(name) for name in merged)


def test_generation_works_through_the_plain_auto_class(bases, tmp_path):
    for family in FAMILIES:
        models, folders = bases[family]
        moe = merge(MoELayout(family, K, 2, split=2), [folders[0]] * K, models[0].config, tmp_path / family)
        settings_ = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        prompt = tokens(shape=(1, 5))
        assert torch.equal(moe.generate(prompt, **settings_), models[0].generate(prompt, **settings_))


@pytest.mark.parametrize("untie", [False, True])
def test_tied_embeddings_stay_tied_or_get_a_head(tmp_path, untie):
    base = random_base(base_config("qwen3_moe", tie_word_embeddings=True))
    base.save_pretrained(tmp_path / "base")
    layout = MoELayout("qwen3_moe", 2, 2, untie=untie)
    moe = merge(layout, [tmp_path / "base"] * 2, base.config, tmp_path / "moe")
    assert ("lm_head.weight" in TensorReader(tmp_path / "moe").names()) == untie
    assert (moe.lm_head.weight is moe.model.embed_tokens.weight) != untie
    with torch.no_grad():
        assert (moe(tokens()).logits - base(tokens()).logits).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("family", "config_class"), [("qwen2_moe", Qwen2MoeConfig), ("qwen3_moe", Qwen3MoeConfig)]
)
def test_all_dense_moe_class_is_a_base_too(tmp_path, family, config_class):
    base = random_base(config_class(**SIZES, mlp_only_layers=[0, 1], num_experts=4))
    base.save_pretrained(tmp_path / "base")
    moe = merge(MoELayout(family, 3, 2, split=2), [tmp_path / "base"] * 3, base.config, tmp_path / "moe")
    with torch.no_grad():
        assert (moe(tokens()).logits - base(tokens()).logits).abs().max() < 1e-5
    with pytest.raises(InputError):
        check_base(family, config_class(**SIZES, mlp_only_layers=[0]))


def test_bf16_bases_give_a_bf16_checkpoint(tmp_path):
    base = random_base(base_config("qwen2_moe")).to(torch.bfloat16)
    base.save_pretrained(tmp_path)
    layout = MoELayout("qwen2_moe", 2, 2, split=2, shared="average")
    merged = dict(merge_tensors(layout, [TensorReader(tmp_path)] * 2, base.config, None))
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    assert moe_config(base.config, layout).dtype == torch.bfloat16


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_names_the_bases_it_takes(family):
    with pytest.raises(InputError, match=rf"gpt2.*{family}.*allowed: (qwen|llama|deepseek|mistral)"):
        check_base(family, GPT2Config())
    check_base(family, base_config(family))


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("deepseek", LlamaConfig(**SIZES, attention_bias=True)),
        ("deepseek", LlamaConfig(**SIZES, mlp_bias=True)),
        ("deepseek_v2", DeepseekV2Config(**SIZES, **MLA, first_k_dense_replace=1)),
        ("deepseek_v3", DeepseekV3Config(**SIZES, **MLA, first_k_dense_replace=1)),
        ("qwen3_moe", Qwen3Config(**SIZES, use_sliding_window=True)),
        ("qwen3", Qwen3Config(**SIZES)),
    ],
)
def test_bases_with_parts_that_the_moe_lacks_are_refused(family, config):
    with pytest.raises(InputError):
        check_base(family, config)


@pytest.mark.parametrize(
    "bad",
    [
        {"top_k": 0},
        {"top_k": 4},
        {"split": 0},
        {"shared": "half"},
        {"family": "switch"},
        {"family": "mixtral", "shared": "zero"},
        {"family": "qwen3_moe", "shared": "average"},
        {"family": "deepseek_v3", "experts": 1, "top_k": 1},
    ],
)
def test_layouts_that_make_no_sense_are_refused(bad):
    with pytest.raises(InputError):
        MoELayout(**{"family": "qwen2_moe", "experts": 3, "top_k": 2, **bad})


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen2_moe", {"split": 3}),
        ("qwen2_moe", {"split": 8}),
        ("qwen2_moe", {"dense_layers": (0, 1)}),
        ("qwen2_moe", {"dense_layers": (2,)}),
        ("deepseek", {"dense_layers": (1,)}),
        ("deepseek_v3", {"dense_layers": (1,)}),
    ],
)
def test_layouts_that_do_not_fit_the_base_are_refused(family, changes):
    with pytest.raises(InputError, match="layout-"):
        moe_config(base_config(family), MoELayout(family, K, 2, **changes))


def test_merge_refuses_wrong_numbers_of_bases_and_router_shapes(bases):
    models, folders = bases["qwen3_moe"]
    readers = [TensorReader(folder) for folder in folders]
    layout = MoELayout("qwen3_moe", K, 2)
    with pytest.raises(InputError, match="bases-count"):
        list(merge_tensors(layout, readers[:2], models[0].config, None))
    with pytest.raises(InputError, match="router-shape"):
        list(merge_tensors(layout, readers, models[0].config, torch.zeros(2, K, 31)))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    family=st.sampled_from(FAMILIES),
    experts=st.integers(2, 5),
    split=st.sampled_from([1, 2, 4]),
    data=st.data(),
)
def test_counts_match_the_tensors_written(bases, family, experts, split, data):
    models, folders = bases[family]
    shared = (
        "none" if not get(family).shared_experts else data.draw(st.sampled_from(["none", "zero", "average"]))
    )
    layout = MoELayout(
        family,
        experts,
        data.draw(st.integers(1, experts)),
        split,
        shared,
        data.draw(st.sampled_from([(), first(family)])),
    )
    merged = dict(merge_tensors(layout, [TensorReader(folders[0])] * experts, models[0].config, None))
    sizes = {name: tensor.numel() for name, tensor in merged.items() if "e_score_correction_bias" not in name}
    routed = sum(size for name, size in sizes.items() if is_expert_name(name))
    count = parameter_count(moe_config(models[0].config, layout))
    assert count["total"] == sum(sizes.values())
    assert count["active"] == count["total"] - routed + routed * layout.top_k // experts


def test_the_layouts_of_qwen_moe_and_deepseek_moe_are_reachable():
    qwen = Qwen2Config(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=16,
    )
    config = moe_config(qwen, MoELayout("qwen2_moe", experts=15, top_k=1, split=4, shared="average"))
    assert (config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size) == (60, 4, 1408)
    published = Qwen2MoeConfig()  # the defaults are those of Qwen1.5-MoE-A2.7B
    assert config.shared_expert_intermediate_size == published.shared_expert_intermediate_size
    assert parameter_count(config) == parameter_count(published)
    assert 14.3e9 < parameter_count(config)["total"] < 14.4e9

    llama = LlamaConfig(
        vocab_size=102400,
        hidden_size=2048,
        intermediate_size=2816,
        num_hidden_layers=28,
        num_attention_heads=16,
    )
    config = moe_config(
        llama, MoELayout("deepseek", experts=32, top_k=3, split=2, shared="average", dense_layers=(0,))
    )
    assert (config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size) == (64, 6, 1408)
    assert (config.shared_expert_intermediate_size, config.mlp_only_layers) == (2 * 1408, [0])
    assert 16.2e9 < parameter_count(config)["total"] < 16.5e9


@pytest.mark.parametrize("family", FAMILIES)
def test_router_logits_are_recorded_layer_by_layer_with_gradient(bases, tmp_path, family):
    models, folders = bases[family]
    layout = MoELayout(family, K, 2, split=2, dense_layers=first(family))
    moe = merge(layout, folders, models[0].config, tmp_path)
    seen = {}
    gate = moe.model.layers[1].mlp.gate
    hook = gate.register_forward_pre_hook(
        lambda module, args: seen.update(hidden=args[0].detach().reshape(-1, 32))
    )
    with router_logits_by_layer(moe) as logits:
        moe(tokens())
        hook.remove()
        assert list(logits) == ([1] if first(family) else [0, 1])
        assert logits[1].shape == (48, 6)
        assert logits[1].dtype == torch.float32
        torch.testing.assert_close(logits[1], seen["hidden"] @ gate.weight.T)
        logits[1].square().sum().backward()
        assert gate.weight.grad.abs().sum() > 0
        recorded = logits[1]
    moe(tokens(1))
    assert logits[1] is recorded  # nothing is recorded once the block is left


@pytest.mark.parametrize("family", FAMILIES)
def test_expert_and_pinned_parameters(bases, tmp_path, family):
    models, folders = bases[family]
    moe = merge(MoELayout(family, K, 2, dense_layers=first(family)), folders, models[0].config, tmp_path)
    layers = (1,) if first(family) else (0, 1)
    assert expert_parameters(moe) == [
        f"model.layers.{layer}.mlp.experts.{part}"
        for layer in layers
        for part in ("gate_up_proj", "down_proj")
    ]
    assert pinned_parameters(moe) == (
        ["model.layers.1.mlp.shared_expert_gate.weight"] if family == "deepseek" else []
    )
    assert pinned_parameters(models[0]) == []


def deepseek_v1_block(
    hidden: torch.Tensor, state: dict[str, torch.Tensor], prefix: str, config: dict
) -> torch.Tensor:
    """The MoE block of DeepSeek-MoE v1: normalised softmax top-k plus ungated shared experts."""

    def ffn(x: torch.Tensor, name: str) -> torch.Tensor:
        gate, up, down = (state[f"{prefix}{name}.{part}_proj.weight"] for part in ("gate", "up", "down"))
        return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T

    scores = (hidden @ state[f"{prefix}gate.weight"].T).softmax(-1)
    weights, chosen = scores.topk(config["num_experts_per_tok"])
    weights = weights / weights.sum(-1, keepdim=True)
    routed = [
        sum(w * ffn(row, f"experts.{e}") for w, e in zip(ws, es, strict=True))
        for row, ws, es in zip(hidden, weights, chosen.tolist(), strict=True)
    ]
    return torch.stack(routed) + ffn(hidden, "shared_experts")


def test_deepseek_v1_export_computes_the_same_block(bases, tmp_path):
    models, folders = bases["deepseek"]
    layout = MoELayout("deepseek", K, 2, split=2, shared="average", dense_layers=(0,))
    moe = merge(layout, folders, models[0].config, tmp_path / "moe")
    (tmp_path / "moe" / "tokenizer.json").write_text("{}")
    export_deepseek_v1(tmp_path / "moe", tmp_path / "v1")
    config = json.loads((tmp_path / "v1" / "config.json").read_text())
    expected = {
        "model_type": "deepseek",
        "n_routed_experts": 6,
        "n_shared_experts": 2,
        "num_experts_per_tok": 4,
    }
    assert expected.items() <= config.items()
    assert (config["first_k_dense_replace"], config["norm_topk_prob"], config["rope_scaling"]) == (
        1,
        True,
        None,
    )
    reader = TensorReader(tmp_path / "v1")
    state = {name: reader.get(name) for name in reader.names()}
    assert not any("shared_expert_gate" in name or ".shared_expert." in name for name in state)
    hidden = torch.randn(10, 32)
    with torch.no_grad():
        block = moe.model.layers[1].mlp(hidden[None])[0]
    torch.testing.assert_close(
        deepseek_v1_block(hidden, state, "model.layers.1.mlp.", config), block, rtol=1e-5, atol=1e-5
    )
    assert (tmp_path / "v1" / "tokenizer.json").read_text() == "{}"


def test_deepseek_v1_export_refuses_what_it_cannot_express(bases, tmp_path):
    models, folders = bases["qwen2_moe"]
    merge(MoELayout("qwen2_moe", K, 2), folders, models[0].config, tmp_path / "qwen")
    with pytest.raises(InputError, match="export-family"):
        export_deepseek_v1(tmp_path / "qwen", tmp_path / "v1")
    models, folders = bases["deepseek"]
    moe = merge(MoELayout("deepseek", K, 2, shared="average"), folders, models[0].config, tmp_path / "moe")
    torch.nn.init.ones_(moe.model.layers[1].mlp.shared_expert_gate.weight)
    moe.save_pretrained(tmp_path / "tuned")
    with pytest.raises(InputError, match="export-gate"):
        export_deepseek_v1(tmp_path / "tuned", tmp_path / "v1")
    assert not (tmp_path / "v1" / "config.json").exists()


def test_a_family_of_a_program_of_ones_own_is_one_like_all(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples")
    before = dict(plugins._registered)
    try:
        import own_family

        assert own_family.FlexOlmo.name in names()
        assert load_config(None, ["family=flex_olmo", "distill.base=x"]).family == "flex_olmo"
        config = Olmo2Config(**SIZES)
        base = random_base(config)
        base.save_pretrained(tmp_path / "base")
        for split, top_k in ((1, 2), (2, 1), (4, 3)):
            layout = MoELayout("flex_olmo", K, top_k, split)
            moe = merge(layout, [tmp_path / "base"] * K, config, tmp_path / f"{split}")
            with torch.no_grad():
                assert (base(tokens()).logits - moe(tokens()).logits).abs().max() < 1e-5
        with pytest.raises(InputError, match="allowed: olmo2"):
            check_base("flex_olmo", base_config("mixtral"))
        layout = MoELayout("flex_olmo", K, 2)
        assert check_family(layout, config).to_dict() == moe_config(config, layout).to_dict()
        for name, wrong in (
            ("expert_tensor", lambda self, prefix, expert, projection: f"{prefix}{expert}.{projection}"),
            ("router_tensors", lambda self, layout, prefix, rows, dtype: iter(())),
            ("settings", lambda self, base, layout, width: {"num_experts": layout.routed + 1}),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(own_family.FlexOlmo, name, wrong)
                with pytest.raises(InputError, match=r"what flex_olmo makes of the bases.*family-broken"):
                    check_family(layout, config)
    finally:
        plugins._registered.clear()
        plugins._registered.update(before)
        sys.modules.pop("own_family", None)
    with pytest.raises(InputError, match=r"there is no 'flex_olmo' among .*mixtral"):
        load_config(None, ["family=flex_olmo"])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_family_of_a_finished_moe_is_known(bases, family):
    models, _ = bases[family]
    found = of(moe_config(models[0].config, MoELayout(family, K, 2)))
    assert isinstance(found, Family)
    assert found.name == family
    assert of(GPT2Config()) is None
