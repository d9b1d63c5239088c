"""An own target family: FlexOlmo, of OLMo-2 bases. docs/guides/extending.md tells what a family says."""

from pathlib import Path
from typing import Any

from transformers import FlexOlmoConfig, PretrainedConfig

from deepfusion import load_config, plugins, run
from deepfusion.families.base import Family, MoELayout


class FlexOlmo(Family):
    """The attention and norms of OLMo-2, experts in every layer, none of them shared."""

    name = "flex_olmo"
    config_class = FlexOlmoConfig
    architecture = "FlexOlmoForCausalLM"
    bases = "olmo2"
    shared_experts = False
    leading_dense = False

    def fits(self, base: PretrainedConfig) -> bool:
        return base.model_type == "olmo2"

    def settings(self, base: PretrainedConfig, layout: MoELayout, width: int) -> dict[str, Any]:
        return {"num_experts": layout.routed, "intermediate_size": width, "norm_topk_prob": True}


# At the top level: worker processes import this file too.
plugins.register("families", FlexOlmo.name, FlexOlmo())


def main(base: str, out: Path, overrides: list[str]) -> None:
    run(load_config(overrides=["family=flex_olmo", f"distill.base={base}", *overrides]), out)


if __name__ == "__main__":
    main("allenai/OLMo-2-0425-1B", Path("runs/flex"), [])
