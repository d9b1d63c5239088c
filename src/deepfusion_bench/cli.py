"""`deepfusion bench`: tables against the baselines. Everything heavy is imported when it is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from deepfusion.errors import InputError
from deepfusion.folders import claim_file, make, write_whole
from deepfusion.sections import MOST_DEVICES, MOST_WORKERS

bench_app = typer.Typer(
    help="Tables against the baselines, made by runs that anybody can repeat.", no_args_is_help=True
)

Cases = Annotated[
    list[str] | None, typer.Option("--case", help="medical or finance (repeatable); default both")
]
Out = Annotated[Path, typer.Option(help="folder of the run folders, from which a killed bench continues")]
Results = Annotated[
    Path | None, typer.Option(help="folder of one JSON file per finished cell; default OUT/results")
]
Workers = Annotated[
    int | None,
    typer.Option(min=1, max=MOST_WORKERS, help="cells side by side, one thread each; default: the cores"),
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="key=value for every cell, may be repeated")
]
Json = Annotated[bool, typer.Option("--json", help="one JSON object on stdout, nothing else")]


@bench_app.command("paper")
def paper(
    case: Cases = None,
    devices: Annotated[str, typer.Option(help="numbers of devices, such as 16,32,64,128")] = "16,32",
    methods: Annotated[
        str, typer.Option(help="methods, such as fused,paper,fedjets; all: every one")
    ] = "all",
    seeds: Annotated[int, typer.Option(help="number of seeds: 0, 1, ...", min=1, max=1000)] = 3,
    out: Out = Path("runs/bench"),
    results: Results = None,
    workers: Workers = None,
    set: Overrides = None,
    json_: Json = False,
) -> None:
    """The paper's two case studies with every method, at a size for this machine."""
    from deepfusion_bench.ablations import row_cell
    from deepfusion_bench.cells import run_cells
    from deepfusion_bench.plots import claim_page
    from deepfusion_bench.tables import ROWS

    names = list(ROWS) if methods == "all" else methods.split(",")
    for name in names:
        if name not in ROWS:
            raise InputError(f"there is no method {name}", allowed=", ".join(ROWS), code="unknown-method")
    cells = [
        row_cell(name, c, n, seed, tuple(set or ()))
        for seed in range(seeds) for n in _numbers(devices) for c in _cases(case) for name in names
    ]  # fmt: skip
    folder = results or out / "results"
    claim_page(out / "results.md")
    run_cells(cells, out, folder, workers)
    _print_page(folder, out, json_)


@bench_app.command("ablation")
def ablation(
    groups: Annotated[
        list[str] | None, typer.Argument(help="which ablations, or all; without any they are listed")
    ] = None,
    case: Cases = None,
    variants: Annotated[
        str | None, typer.Option(help="only these, such as no-features,causal; default all of the groups")
    ] = None,
    devices: Annotated[int, typer.Option(help="number of devices", min=1, max=MOST_DEVICES)] = 16,
    seeds: Annotated[int, typer.Option(help="number of seeds: 0, 1, ...", min=1, max=1000)] = 1,
    out: Out = Path("runs/bench"),
    results: Results = None,
    workers: Workers = None,
    set: Overrides = None,
    json_: Json = False,
) -> None:
    """Change one thing at a time; measured on the devices' held-out text."""
    from deepfusion_bench.ablations import ABLATIONS, ablation_cells
    from deepfusion_bench.cells import run_cells
    from deepfusion_bench.plots import claim_page

    if not groups:
        return _print_ablations(json_)
    chosen = list(ABLATIONS) if groups == ["all"] else groups
    only, given = variants.split(",") if variants else None, tuple(set or ())
    cells = [
        cell for c in _cases(case) for cell in ablation_cells(chosen, c, devices, range(seeds), given, only)
    ]
    folder = results or out / "results"
    claim_page(out / "results.md")
    run_cells(cells, out, folder, workers)
    _print_page(folder, out, json_)


@bench_app.command("costs")
def costs_command(
    rounds: Annotated[int, typer.Option(help="rounds of FedJETS", min=1, max=1000)] = 4,
    measure: Annotated[
        bool, typer.Option(help="also measure peak memory on this machine, for some minutes")
    ] = False,
    out: Annotated[Path, typer.Option(help="JSON file to write")] = Path("runs/bench/costs.json"),
    json_: Json = False,
) -> None:
    """Bytes over the network and memory on a device, ours beside FedJETS, at the paper's real model sizes."""
    from deepfusion_bench import costs

    out = claim_file(out, _is_costs)
    make(out.parent)
    found = {"communication": costs.communication(rounds), "memory": costs.memory()}
    if measure:
        found["measured"] = costs.measure(out.parent)
    write_whole(out, json.dumps(found, indent=1) + "\n")
    print(json.dumps(found) if json_ else costs.tables(found))


@bench_app.command("page")
def page_command(
    results: Annotated[Path, typer.Option(help="folder of results")] = Path("benchmarks/results/bench"),
    costs: Annotated[Path, typer.Option(help="JSON file of `bench costs`")] = Path(
        "benchmarks/results/costs.json"
    ),
    out: Annotated[Path, typer.Option(help="Markdown page to write; plots lie beside it")] = Path(
        "benchmarks/results.md"
    ),
) -> None:
    """Write the page of all results; equal results give an equal page."""
    from deepfusion_bench.plots import claim_page, write_plots
    from deepfusion_bench.tables import page

    out = claim_page(out)
    if not any(results.glob("*.json")):
        raise InputError(
            "no results in this folder",
            where=results,
            fix="deepfusion bench paper makes some",
            code="no-results",
        )
    text = page(results, costs)
    make(out.parent)
    write_whole(out, text)
    write_plots(results, out.parent)


def _is_costs(text: str) -> bool:
    found = json.loads(text)
    return isinstance(found, dict) and {"communication", "memory"} <= found.keys()


def _cases(given: list[str] | None) -> list[str]:
    from deepfusion_bench.cells import CASES

    for name in given or ():
        if name not in CASES:
            raise InputError(f"there is no case {name}", allowed=", ".join(CASES), code="unknown-case")
    return given or list(CASES)


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = [0]
    if not all(1 <= number <= MOST_DEVICES for number in numbers):
        allowed = f"whole numbers such as 16,32, each 1 to {MOST_DEVICES}"
        raise InputError(f"--devices {text[:100]}", allowed=allowed, code="bad-devices")
    return numbers


def _print_ablations(json_: bool) -> None:
    import rich
    from rich.markup import escape
    from rich.table import Table

    from deepfusion_bench.ablations import ABLATIONS

    rows = [
        (group, v.method, v.name, " ".join((*v.shared, *v.own)))
        for group, variants in ABLATIONS.items()
        for v in variants
    ]
    columns = ("group", "method", "variant", "change")
    if json_:
        return print(json.dumps({"ablations": [dict(zip(columns, row, strict=True)) for row in rows]}))
    table = Table(*columns)
    table.columns[-1].overflow = "fold"  # a change that is cut off says nothing
    for row in rows:
        table.add_row(*map(escape, row))
    rich.print(table)


def _print_page(results: Path, out: Path, json_: bool) -> None:
    from deepfusion_bench.tables import page, read_results

    if json_:
        return print(json.dumps({"results": read_results(results)}))
    from deepfusion_bench.plots import write_plots

    text = page(results)
    write_whole(out / "results.md", text)
    write_plots(results, out)
    print(text)
