"""Tables and plots from the results of cells; nothing is computed here that is not in the JSON files."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from deepfusion_bench import costs
from deepfusion_bench.ablations import ABLATIONS
from deepfusion_bench.cells import CASES, read_cell
from deepfusion_bench.methods import METHODS

Row = dict[str, Any]

# As printed in [DF], for N = 16, 32, 64, 128. Other models, data and sizes: only the order of the methods can be
# compared.
PAPER: dict[str, dict[str, dict[str, tuple[float, ...]]]] = {
    "log_perplexity": {
        "medical": {
            "fedjets": (0.1639, 0.1588, 0.1557, 0.1571),
            "fedkmt": (0.1609, 0.1574, 0.1526, 0.1546),
            "ofakd": (0.1573, 0.1535, 0.1510, 0.1494),
            "paper": (0.1603, 0.1569, 0.1551, 0.1494),
        },
        "finance": {
            "fedjets": (3.9717, 3.9863, 3.9987, 4.0006),
            "fedkmt": (3.9908, 3.9811, 3.9941, 4.0030),
            "ofakd": (4.0375, 4.0398, 4.0224, 4.0333),
            "paper": (3.9697, 3.9700, 3.9774, 3.9723),
        },
    },
    "token_accuracy": {
        "medical": {
            "fedjets": (0.9245, 0.9239, 0.9236, 0.9241),
            "fedkmt": (0.9234, 0.9242, 0.9242, 0.9238),
            "ofakd": (0.9238, 0.9238, 0.9241, 0.9255),
            "paper": (0.9252, 0.9241, 0.9242, 0.9245),
        },
        "finance": {
            "fedjets": (0.2828, 0.2947, 0.2903, 0.2864),
            "fedkmt": (0.2826, 0.2957, 0.2906, 0.2893),
            "ofakd": (0.2789, 0.2888, 0.2904, 0.2895),
            "paper": (0.2832, 0.2967, 0.2906, 0.2922),
        },
    },
}
PAPER_N = (16, 32, 64, 128)
PROXIES_16 = "fused/proxies-16"
_TITLES = {name: method.title for name, method in METHODS.items()}
ROWS = {"fused": _TITLES["fused"], PROXIES_16: f"{_TITLES['fused']}, 16 proxies"} | _TITLES
"""The rows of the tables, in order, and their titles: a method or, after a slash, one of its variants."""
OURS = ("fused", PROXIES_16, "paper")
DATA_FREE = "sampled-only"
OWN_STEPS = "own-steps"
OTHER_TOKENIZER = ("average", "homogeneous", "proxies")  # their tokens are others: only bits per byte compare


def read_results(folder: Path) -> list[Row]:
    """Every cell's result, sorted by name.

    Raises:
        InputError: a JSON file that is something else.
    """
    return [read_cell(path) for path in sorted(folder.glob("*.json"))]


def page(results: Path, costs_file: Path | None = None) -> str:
    """The whole page of results as Markdown; equal files give equal text."""
    rows = read_results(results)
    bounded = with_best_bound(rows)
    parts = [_intro(rows), in_short(bounded)]
    for case, title in CASES.items():
        own = [row for row in bounded if row["case"] == case]
        if any(row_name(row) in ROWS for row in own):
            parts.append(
                f"## {title[0].upper()}{title[1:]}\n\n![Log-perplexity over "
                f"N](results-{case}.svg)\n\n{case_tables(own)}"
            )
        else:
            parts.append(f"## {title[0].upper()}{title[1:]}\n\nNo cell has been run yet.")
    changed = ablation_tables(rows)
    if changed:
        parts.append(f"## Ablations\n\n{changed}")
    parts.append(_budgets(bounded))
    if costs_file is not None and costs_file.is_file():
        parts.append(costs.tables(json.loads(costs_file.read_text("utf-8"))))
    return "\n\n".join(part for part in parts if part) + "\n"


def with_best_bound(rows: list[Row]) -> list[Row]:
    """`rows`, where of each centralized run the one with the steps that are best on held-out text has no variant.

    A run is a bound only where it has converged: too few steps leave something to learn, too many overfit. The one
    with the case's own steps is kept as variant `OWN_STEPS`.
    """
    steps = {variant.name for variant in ABLATIONS["centralized"]}
    runs: dict[tuple[str, int, int], list[Row]] = defaultdict(list)
    for row in rows:
        if row["method"] == "centralized" and row["variant"] in {"", *steps}:
            runs[row["case"], row["devices"], row["seed"]].append(row)
    best = [min(same, key=lambda row: _value(row, "log_perplexity", "validation")) for same in runs.values()]
    own = [{**row, "variant": OWN_STEPS} for same in runs.values() for row in same if not row["variant"]]
    return (
        [row for row in rows if row["method"] != "centralized"]
        + own
        + [{**row, "variant": ""} for row in best]
    )


def in_short(rows: list[Row]) -> str:
    """In each cell, how many methods `fused` is ahead of, and which it is not, by paired differences over seeds."""
    lines = []
    for case in CASES:
        own = [row for row in rows if row["case"] == case]
        for count in _counts(own):
            for key, title, form, scale in (
                ("log_perplexity", "loss", "+.4f", -1),
                ("token_accuracy", "token accuracy, %", "+.2f", 100),
            ):
                for ours, proxies in (("fused", "one per expert"), (PROXIES_16, "16")):
                    gains = {
                        name: found
                        for name in METHODS
                        if (found := _gains(own, count, ours, name, key, scale))
                    }
                    if gains:
                        lines.append(f"| {case}, {count} | {title} | {proxies} | {_standing(gains, form)} |")
    if not lines:
        return ""
    head = (
        "| case, N | measure | proxies | `fused` ahead of | beyond the spread | behind, or within "
        "the spread (better by) |"
    )
    note = (
        "Recipe `fused` against recipe `paper`, the baselines and the controls below, on test text, "
        "seed by seed. The loss is "
        "log-perplexity, for models with other tokenizers bits per byte. Beyond the spread: the mean "
        "of the differences is more "
        "than their standard deviation. One proxy per expert (4) is the default; 16 is `clustering.proxies: 16`."
    )
    return "\n".join([f"## In short\n\n{note}\n", head, "|---" * 6 + "|", *lines])


def _standing(gains: dict[str, list[float]], form: str) -> str:
    ahead = {name for name, found in gains.items() if mean(found) > 0}
    seeds = max(map(len, gains.values()))
    clear = {name for name in ahead if len(gains[name]) > 1 and mean(gains[name]) > stdev(gains[name])}
    named = gains.keys() - (clear if seeds > 1 else ahead)
    rest = [f"{ROWS[name]} {_spread(found, form)}" for name, found in gains.items() if name in named]
    return (
        f"{len(ahead)} of {len(gains)} | {len(clear) if seeds > 1 else 'one seed'} | {'; '.join(rest) or '–'}"
    )


def _gains(rows: list[Row], count: int, ours: str, rival: str, key: str, scale: float) -> list[float]:
    """By how much `ours` is better, seed by seed; empty where the two cannot be compared."""
    if rival != "paper" and METHODS[rival].role not in ("baseline", "control"):
        return []
    if rival in OTHER_TOKENIZER:
        if key != "log_perplexity":
            return []
        key = "bits_per_byte"
    own, other = _pick(rows, ours, count), _pick(rows, rival, count)
    return [
        scale * (_value(own[seed], key) - _value(other[seed], key))
        for seed in sorted(own.keys() & other.keys())
    ]


def case_tables(rows: list[Row]) -> str:
    """The tables of one case: losses, accuracies, paired differences, and how far it is to the bound.

    Of the ablations among `rows` only those without public text are shown, beside the bounds.
    """
    case, counts = rows[0]["case"], _counts(rows)
    same = [name for name in ROWS if name not in OTHER_TOKENIZER]
    parts = [
        "Log-perplexity on test text, nats per token (mean over domains, then mean ± standard "
        "deviation over seeds; in brackets "
        "the number of seeds where it is not that of most cells), lower is better:",
        _table(rows, counts, same, "log_perplexity", ".4f"),
        "Bits per byte, which also compare models with other tokenizers, lower is better:",
        _table(rows, counts, list(ROWS), "bits_per_byte", ".4f"),
        "Token accuracy, %:",
        _table(rows, counts, same, "token_accuracy", ".2f", 100),
    ]
    if any(_has(row, "choice_accuracy") for row in rows):
        parts += [
            "Multiple-choice accuracy, % (chance is near 25):",
            _table(rows, counts, same, "choice_accuracy", ".1f", 100),
        ]
    for ours in OURS:
        if any(row_name(row) == ours for row in rows):
            parts += [
                f"{ROWS[ours]}, against each method, same seed, same devices: log-perplexity of the "
                "method less its own, "
                "so above 0 it is better than the method (for other tokenizers, marked *, bits per byte):",
                _paired(rows, counts, ours),
            ]
    parts += [_bounds(rows, counts), _from_the_paper(case)]
    return "\n\n".join(part for part in parts if part)


def ablation_tables(rows: list[Row]) -> str:
    """One table per group: the change against the unchanged method, on the devices' held-out text, never on test
    text.
    """
    parts = []
    by = {(row["case"], row["devices"], row["method"], row["variant"], row["seed"]): row for row in rows}
    for group, variants in ABLATIONS.items():
        lines = []
        for variant in variants:
            found: dict[tuple[str, int], list[Row]] = defaultdict(list)
            for row in rows:
                if (row["method"], row["variant"]) == (variant.method, variant.name):
                    found[row["case"], row["devices"]].append(row)
            for (case, count), cells in sorted(found.items()):
                pairs = [
                    (by[key], cell)
                    for cell in cells
                    if (key := (case, count, variant.method, variant.against, cell["seed"])) in by
                ]
                if pairs:
                    what = "; ".join((*variant.shared, *variant.own))
                    lines.append(
                        f"| {variant.method} | `{what}` | {case}, {count} | {_change(pairs)} | {len(pairs)} |"
                    )
        if lines:
            head = "| recipe | change | case, N | nats per token | against unchanged | bits per byte | MB up | seeds |"
            parts.append("\n".join([f"### {group}\n", head, "|---" * 8 + "|", *lines]))
    if not parts:
        return ""
    note = (
        "Held-out text of the devices (validation), mean ± standard deviation over seeds; below 0 "
        "the change is better. "
        "What changes something beside `distill.handover=0` is compared with the method that has "
        "this and nothing else changed, "
        "and so are 16 proxies where samples are all there is, or devices hold a domain each."
    )
    return "\n\n".join([note, *parts])


def _change(pairs: list[tuple[Row, Row]]) -> str:
    plain, own = (
        [_value(row, "log_perplexity", "validation") for row in side] for side in zip(*pairs, strict=True)
    )
    changed = [row for _, row in pairs]
    bits = [_value(row, "bits_per_byte", "validation") for row in changed]
    change = [b - a for a, b in zip(plain, own, strict=True)]
    return f"{_spread(own, '.4f')} | {_spread(change, '+.4f')} | {_spread(bits, '.4f')} | {_moved(changed)}"


def _moved(cells: list[Row], way: str = "up") -> str:
    return f"{mean(row['transport'][f'total_{way}_bytes'] for row in cells) / 1e6:,.1f}"


def _intro(rows: list[Row]) -> str:
    if not rows:
        return "# Results\n\nNo cell has been run yet."
    machines = sorted({_machine(row["hardware"]) for row in rows})
    dates = sorted({row["date"] for row in rows})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    packages = ("torch", "transformers")
    versions = sorted({", ".join(f"{name} {row['packages'][name]}" for name in packages) for row in rows})
    return (
        "# Results\n\n"
        f"Made by `deepfusion bench page` from {len(rows)} results, each a JSON file with its config, "
        "versions, seed, hardware, "
        f"budget and date. Measured {when} on {'; '.join(machines)}; {'; '.join(versions)}.\n\n"
        "All methods share the devices' uploads, the public text, the test text (documents that no "
        "device and no server has seen), "
        "the training loop, the optimizer and the evaluation. The models are small (0.6 to 2 million "
        "weights), so absolute numbers "
        "say little about large models; what compares is a method with a method in the same column."
    )


def _machine(hardware: Row) -> str:
    return f"{hardware['cores']} cores of {hardware['machine']}, {hardware['gpu'] or 'no GPU'}"


def _value(row: Row, key: str, text: str = "test") -> float:
    value = _mean_over_domains(row[text], key)
    assert value is not None
    return value


def _mean_over_domains(found: Row, key: str) -> float | None:
    if key in found["mean_over_domains"]:
        return found["mean_over_domains"][key]
    # Results of before the choices had a mean of their own.
    each = [values[key] for values in found.get("by_domain", {}).values() if values.get(key) is not None]
    return mean(each) if each else None


def _spread(values: Sequence[float], form: str, scale: float = 1.0) -> str:
    scaled = [scale * value for value in values]
    shown = format(mean(scaled), form)
    return f"{shown} ± {format(stdev(scaled), form.lstrip('+'))}" if len(scaled) > 1 else shown


def row_name(row: Row) -> str:
    """As a row of the tables."""
    return "/".join(filter(None, (row["method"], row["variant"])))


def _counts(rows: Iterable[Row]) -> list[int]:
    return sorted({row["devices"] for row in rows if row_name(row) in ROWS})


def _pick(rows: Iterable[Row], name: str, count: int) -> dict[int, Row]:
    own = [row for row in rows if row_name(row) == name]
    found = {row["seed"]: row for row in own if row["devices"] == count}
    if name.startswith("centralized") and not found:  # the union of all private text does not depend on N
        fewest = min((row["devices"] for row in own), default=None)
        found = {row["seed"]: row for row in own if row["devices"] == fewest}
    return found


def _grid(
    counts: Sequence[int], names: Sequence[str], cell: Callable[[str, int], str], head: str = "method"
) -> str:
    lines = [
        f"| {head} | " + " | ".join(f"N = {count}" for count in counts) + " |",
        "|---" * (len(counts) + 1) + "|",
    ]
    for name in names:
        cells = [cell(name, count) for count in counts]
        if any(cells):
            lines.append(f"| {ROWS[name]} | " + " | ".join(c or "–" for c in cells) + " |")
    return "\n".join(lines)


def _table(
    rows: list[Row], counts: Sequence[int], names: Sequence[str], key: str, form: str, scale: float = 1.0
) -> str:
    usual = _usual_seeds(rows)

    def cell(name: str, count: int) -> str:
        found = [row for row in _pick(rows, name, count).values() if _has(row, key)]
        if not found:
            return ""
        text = _spread([_value(row, key) for row in found], form, scale)
        return text if len(found) == usual else f"{text} [{len(found)}]"

    return _grid(counts, names, cell)


def _has(row: Row, key: str) -> bool:
    return _mean_over_domains(row["test"], key) is not None


def _usual_seeds(rows: list[Row]) -> int:
    sizes = [len(_pick(rows, name, count)) for name in ROWS for count in _counts(rows)]
    present = [size for size in sizes if size]
    return max(set(present), key=present.count)


def _paired(rows: list[Row], counts: Sequence[int], ours: str) -> str:
    def cell(name: str, count: int) -> str:
        own, other = _pick(rows, ours, count), _pick(rows, name, count)
        key = "bits_per_byte" if name in OTHER_TOKENIZER else "log_perplexity"
        seeds = sorted(own.keys() & other.keys())
        if name == ours or not seeds:
            return ""
        star = " *" if name in OTHER_TOKENIZER else ""
        return _spread([_value(other[s], key) - _value(own[s], key) for s in seeds], "+.4f") + star

    return _grid(counts, [name for name in ROWS if name != ours], cell)


def _bounds(rows: list[Row], counts: Sequence[int]) -> str:
    """Ratio to the centralized run, share of the gap that is closed, and bits per byte over those of the proxies."""
    head = ["method", "N", "log-perplexity over centralized", "share of the gap from base to centralized, %"]
    head += [
        "the same for centralized with the case's own steps",
        "share, %",
        "bits per byte over the proxies' mean",
        "over the best single proxy",
    ]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    titles = ROWS | {f"{name}/{DATA_FREE}": f"{ROWS[name]}, no public text" for name in ("fused", "paper")}
    for name in (*OURS, *(name for name in titles if name not in ROWS)):
        for count in counts:
            own = _pick(rows, name, count)
            base, proxies = _pick(rows, "base", count), _pick(rows, "proxies", count)
            columns: list[tuple[list[float], str, float]] = []
            for bounds in ("centralized", f"centralized/{OWN_STEPS}"):
                bound = _pick(rows, bounds, count)
                losses = [
                    tuple(_value(side[seed], "log_perplexity") for side in (own, bound, base))
                    for seed in own
                    if seed in base.keys() & bound.keys()
                ]
                columns.append(([ours / best for ours, best, _ in losses], ".3f", 1.0))
                columns.append(
                    ([(first - ours) / (first - best) for ours, best, first in losses], ".1f", 100.0)
                )
            if name == PROXIES_16:
                proxies = {}  # its teachers are others
            taught = [(_value(own[seed], "bits_per_byte"), proxies[seed]) for seed in own if seed in proxies]
            columns.append(([bits / _value(proxy, "bits_per_byte") for bits, proxy in taught], ".3f", 1.0))
            columns.append(
                (
                    [
                        bits / min(each["bits_per_byte"] for each in proxy["models"].values())
                        for bits, proxy in taught
                    ],
                    ".3f",
                    1.0,
                )
            )
            shown = [_spread(*column) if column[0] else "–" for column in columns]
            if any(column[0] for column in columns):
                lines.append(f"| {titles[name]} | {count} | " + " | ".join(shown) + " |")
    return (
        "How far it is to the upper bound and to its teachers:\n\n" + "\n".join(lines)
        if len(lines) > 2
        else ""
    )


def _from_the_paper(case: str) -> str:
    parts = []
    for key, title, form, scale in (
        ("log_perplexity", "log token perplexity", ".4f", 1.0),
        ("token_accuracy", "token accuracy, %", ".2f", 100.0),
    ):
        printed = PAPER[key][case]
        cells = {name: [format(scale * value, form) for value in values] for name, values in printed.items()}
        table = _grid(PAPER_N, list(printed), lambda name, n, cells=cells: cells[name][PAPER_N.index(n)])  # type: ignore[misc]
        parts.append(f"[DF] prints, for its own models and data, {title}:\n\n{table}")
    return "\n\n".join(parts)


def _budgets(rows: list[Row]) -> str:
    """Steps, tokens and FLOPs of each method, on all devices and on the server; bytes up and down."""
    head = [f"{side} {what}" for side in ("device", "server") for what in ("steps", "tokens", "FLOPs")]
    lines = ["| case, N | method | " + " | ".join([*head, "MB up", "MB down"]) + " |", "|---" * 10 + "|"]
    groups: dict[tuple[str, int, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row_name(row) in ROWS and METHODS[row["method"]].role != "reference" and row["method"] != "base":
            groups[row["case"], row["devices"], row_name(row)].append(row)
    order = {name: place for place, name in enumerate(ROWS)}
    for case, count, name in sorted(groups, key=lambda key: (key[0], key[1], order[key[2]])):
        cells = groups[case, count, name]
        sides = (
            [row["budget"]["device"] for row in cells],
            [_total(row["budget"]["server"].values()) for row in cells],
        )
        forms = (("steps", ",.0f"), ("tokens", ",.0f"), ("flops", ".2e"))
        work = [format(mean(w[key] for w in side), form) for side in sides for key, form in forms]
        moved = [_moved(cells), _moved(cells, "down")]
        lines.append(f"| {case}, {count} | {ROWS[name]} | " + " | ".join([*work, *moved]) + " |")
    if not groups:
        return ""
    note = (
        "Counted by the runs, means over seeds. FLOPs: 6 for each weight that works on a token of what is trained, "
        "2 for each that works on one of a teacher. What proxies compute to be matched with texts "
        "and to write some is not counted."
    )
    return "\n".join([f"## Budgets\n\n{note}\n", *lines])


def _total(parts: Iterable[dict[str, float]]) -> dict[str, float]:
    kept = list(parts)
    return {key: sum(part[key] for part in kept) for key in ("steps", "tokens", "flops")}
