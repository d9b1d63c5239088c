"""What an ablation changes: one group a question, one variant a change of the config, all else as in the unchanged
method.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from deepfusion.errors import InputError
from deepfusion_bench.cells import Cell


@dataclass(frozen=True)
class Variant:
    """One row of an ablation table: `own` changes the server's work alone, `shared` the devices' too.

    `name` is unique among the variants of a method, over all groups: results are stored by it. It is compared with
    the variant `against` of the same method; without one, with the unchanged method.
    """

    method: str
    name: str
    own: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    against: str = ""

    def cell(self, case: str, devices: int, seed: int, given: tuple[str, ...] = ()) -> Cell:
        """Its cell; `given` overrides hold for devices and server."""
        return Cell(case, devices, seed, self.method, self.name, (*given, *self.shared), self.own)


def _each(method: str, **changes: str) -> tuple[Variant, ...]:
    return tuple(
        Variant(method, name.replace("_", "-"), tuple(change.split())) for name, change in changes.items()
    )


_TWO_SCHEDULES = Variant("fused", "two-schedules", ("distill.handover=0",))


def _two_schedules(*variants: Variant) -> tuple[Variant, ...]:
    """Variants measured before one schedule over distillation and tuning was the default; so is what they are
    compared with.
    """
    return tuple(replace(v, own=(*_TWO_SCHEDULES.own, *v.own), against=_TWO_SCHEDULES.name) for v in variants)


_BY_DOMAIN = "data.partition.scheme=by_domain"

ABLATIONS: dict[str, tuple[Variant, ...]] = {
    # Is View-Aligned Attention worth it? In recipe paper, whose phase II it is made for, and in recipe fused.
    "vaa": (
        *_each(
            "paper",
            no_features="distill.alpha=0",
            plain_features="distill.vaa.mode=direct",
            causal="distill.vaa.causal=true",
            tokenwise="distill.vaa.patches=256 distill.vaa.kernel=1",
            alpha_1="distill.alpha=1",
            alpha_10="distill.alpha=10",
        ),
        *_each(
            "fused",
            no_features="distill.alpha=0",
            plain_features="distill.vaa.mode=direct",
            causal="distill.vaa.causal=true",
            alpha_01="distill.alpha=0.1",
            alpha_10="distill.alpha=10",
        ),
    ),
    "vaa-sizes": _each(
        "paper",
        J_1="distill.vaa.blocks=1",
        J_3="distill.vaa.blocks=3 distill.vaa.patches=33",  # the smallest device models have three layers
        Pq_8="distill.vaa.patches=8",
        Pq_128="distill.vaa.patches=128",
        d_16="distill.vaa.width=16",
        d_256="distill.vaa.width=256",
    ),
    "losses": (
        *_each(
            "paper",
            beta_0="distill.beta=0 distill.chunk_weight=0",
            beta_3="distill.beta=3",
            temperature_2="distill.temperature=2",
        ),
        *_each(
            "fused",
            beta_3="distill.beta=3 tune.beta=3",
            beta_03="distill.beta=0.3 tune.beta=0.3",
            temperature_2="distill.temperature=2 tune.temperature=2",
            no_chunks="distill.chunk_weight=0 tune.chunk_weight=0",
            no_ce="distill.ce_weight=0 tune.ce_weight=0",
        ),
        # The same care for the baselines: the weight of what they take from their teachers, and the weights of
        # FedMKT's own code.
        *_each("fedkmt", as_published="distill.ce_weight=0.9 distill.beta=0.1", beta_3="distill.beta=3"),
        *_each("ofakd", beta_03="distill.beta=0.3", beta_3="distill.beta=3"),
    ),
    "recipe": (
        *_two_schedules(
            *_each(
                "fused",
                no_trunk="distill.trunk_share=0",
                half_trunk="distill.trunk_share=0.5",
                no_teachers_in_tune="tune.teachers=false",
                frozen_experts="tune.train_experts=false",
                plain_mean="clustering.average=uniform",
                no_teachers="distill.alpha=0 distill.beta=0 distill.chunk_weight=0 tune.teachers=false",
                moe_only="distill.steps=0 tune.steps=420",
                moe_only_equal_flops="distill.steps=0 tune.steps=300",
                long_tune_equal_flops="distill.steps=160 tune.steps=200",
                trunk_only_equal_flops="distill.steps=480 tune.steps=0",  # its experts are equal: a dense model
                four_times_the_server="distill.steps=1280 tune.steps=400",
            )
        ),
        *_each("fused", twice_the_server="distill.steps=640 tune.steps=200"),
    ),
    "moe": _each(
        "fused",
        prototype_router="merge.router=prototype",
        top_1="top_k=1",
        top_4="top_k=4",
        no_shared="merge.shared_expert=none",
        silent_shared="merge.shared_expert=zero",
    ),
    # The same care for all: learning rates of every method around the case's own, 2e-3.
    "learning-rates": (
        *_two_schedules(
            *(
                Variant(
                    method, f"lr-{rate:g}", (f"distill.learning_rate={rate}", f"tune.learning_rate={rate}")
                )
                for method in ("fused", "paper", "fedkmt", "ofakd", "public")
                for rate in (1e-3, 4e-3)
            )
        ),
        *_each("fedjets", **{f"lr_{rate:g}": f"device.learning_rate={rate}" for rate in (1e-3, 4e-3)}),
    ),
    # A schedule each for distillation and tuning, in place of one over both; and a rate that does not fall before the
    # MoE is tuned.
    "schedule": (
        *(
            replace(_TWO_SCHEDULES, method=method)
            for method in ("fused", "paper", "fedkmt", "ofakd", "public")
        ),
        *_each("fused", handover_1="distill.handover=1"),
    ),
    # Does the upper bound train to convergence, and at which rate? The tables take the best of these on held-out text
    # as the bound.
    "centralized": _each(
        "centralized",
        half="tune.steps=1200 device.epochs=3",
        twice="tune.steps=4800 device.epochs=12",
        four_times="tune.steps=9600 device.epochs=24",
        eight_times="tune.steps=19200 device.epochs=48",
        twice_the_rate="tune.learning_rate=0.004",
        four_times_the_rate="tune.learning_rate=0.008",
        answers_only="data.prompt_loss_weight=0",
    ),
    "clusters": _each(
        "fused",
        random_clusters="clustering.assignment=random",
        K_3="experts=3",
        K_8="experts=8",
        proxy_per_device="experts=16",
        proxies_16="clustering.proxies=16",
        proxies_32="clustering.proxies=32",
    ),
    "public": (
        *_each(
            "fused",
            in_domain="data.public=[in_domain]",
            with_samples="data.public=[in_domain,sampled] distill.sampled_ce=0",
            samples_ce="data.public=[in_domain,sampled] distill.sampled_ce=1",
            many_samples="data.public=[in_domain,sampled] distill.sampled_ce=0 data.sampled_documents=384",
            sampled_only="data.public=[sampled] distill.sampled_ce=0 data.sampled_documents=384",
            generic="data.public=[generic]",
            generic_sampled="data.public=[generic,sampled] distill.sampled_ce=0",
        ),
        # As many samples in all as `sampled-only`.
        Variant(
            "fused",
            "sampled-only-proxies-16",
            against="sampled-only",
            own=(
                "data.public=[sampled]",
                "distill.sampled_ce=0",
                "data.sampled_documents=96",
                "clustering.proxies=16",
            ),
        ),
        *_each("paper", sampled_only="data.public=[sampled] data.sampled_documents=384"),
        *_two_schedules(
            *_each("fused", samples_as_they_come="distill.sampled_share=1"),
            *_each("paper", samples_at_most_half="distill.sampled_share=0.5"),
        ),
    ),
    # What a small upload costs in quality, next to its bytes.
    "uploads": _two_schedules(
        Variant("fused", "delta8", shared=("device.upload=delta8",)),
        Variant("fused", "delta4", shared=("device.upload=delta4",)),
        Variant("fused", "lora", shared=("device.method=lora",)),
    ),
    "devices": (
        *(
            Variant(method, name, shared=(change,))
            for method in ("fused", "paper")
            for name, change in (("all-llama", "device.types=[tiny-llama]"), ("by-domain", _BY_DOMAIN))
        ),
        Variant(
            "fused",
            "by-domain-proxies-16",
            shared=(_BY_DOMAIN,),
            own=("clustering.proxies=16",),
            against="by-domain",
        ),
    ),
}

_KNOWN = {(variant.method, variant.name): variant for group in ABLATIONS.values() for variant in group}


def row_cell(name: str, case: str, devices: int, seed: int, given: tuple[str, ...] = ()) -> Cell:
    """The cell of a row of the tables: `name` is a method or, with a slash, one of its variants; `given` holds for
    all.
    """
    method, _, variant = name.partition("/")
    found = _KNOWN[method, variant] if variant else Variant(method, "")
    return found.cell(case, devices, seed, given)


def ablation_cells(
    groups: Sequence[str],
    case: str,
    devices: int,
    seeds: range,
    given: tuple[str, ...] = (),
    only: Sequence[str] | None = None,
) -> list[Cell]:
    """The cells of the groups, and the unchanged ones that they are compared with.

    Args:
        given: overrides that hold for all.
        only: names of the variants to keep; None for all of the groups.

    Raises:
        InputError: there is no such group, or no such variant in the groups.
    """
    for group in groups:
        if group not in ABLATIONS:
            raise InputError(
                f"there is no ablation {group}", allowed=", ".join(ABLATIONS), code="unknown-ablation"
            )
    variants = [variant for group in groups for variant in ABLATIONS[group]]
    names = dict.fromkeys(variant.name for variant in variants)
    for name in only or ():
        if name not in names:
            allowed = ", ".join(names)
            raise InputError(
                f"there is no variant {name}",
                where=", ".join(groups),
                allowed=allowed,
                code="unknown-ablation",
            )
    variants = [variant for variant in variants if only is None or variant.name in only]
    compared = [_KNOWN.get((v.method, v.against), Variant(v.method, "")) for v in variants]
    return [
        v.cell(case, devices, seed, given) for seed in seeds for v in dict.fromkeys((*compared, *variants))
    ]
