"""Small inline SVG charts that follow the page's light or dark colours; every text in them is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from markupsafe import Markup
from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.ticker import MaxNLocator

# Readable on white and on near-black, and apart for the colour-blind (Okabe and Ito, without black and yellow).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7f7f7f", "#8c6bb1")
# Beyond this many series a legend says less than the lines do.
MOST_NAMED = 10
# Beyond this many rows or columns the numbers in the cells would be too small to read.
MOST_LABELLED = 16
# Longer names are cut.
MOST_LETTERS = 16

Point = tuple[float, float]


def colour(index: int) -> str:
    """The colour of the n-th series."""
    return COLOURS[index % len(COLOURS)]


def line_chart(series: Mapping[str, Sequence[Point]], title: str, x_label: str, y_label: str) -> Markup:
    """Lines through (x, y) points, one per named series, with axes and (for few series) a legend."""
    width, height, left, top, bottom = 500, 260, 52, 30, 42
    points = [point for line in series.values() for point in line]
    x_ticks = MaxNLocator(6, integer=True).tick_values(0, max(x for x, _ in points))
    y_ticks = MaxNLocator(5).tick_values(min(y for _, y in points), max(y for _, y in points))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return left + across * (width - left - 12), height - bottom - up * (height - top - bottom)

    parts = [_text(left, 16, title, "title")]
    for tick in y_ticks:
        x, y = place(x_ticks[0], tick)
        parts += [_line(x, y, width - 12, y, "grid"), _text(x - 6, y + 4, f"{tick:g}", "tick end")]
    for tick in x_ticks:
        x, y = place(tick, y_ticks[0])
        parts.append(_text(x, y + 15, f"{tick:g}", "tick middle"))
    parts.append(_text((left + width) / 2, height - 8, x_label, "tick middle"))
    parts.append(
        Markup('<text class="tick middle" transform="translate(12 {}) rotate(-90)">{}</text>').format(
            height / 2, y_label
        )
    )
    for index, (name, line) in enumerate(series.items()):
        if len(line) == 1:
            parts.append(
                Markup('<circle cx="{:.1f}" cy="{:.1f}" r="3" fill="{}"/>').format(
                    *place(*line[0]), colour(index)
                )
            )
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in line))
        parts.append(
            Markup('<polyline points="{}" stroke="{}" class="line"><title>{}</title></polyline>').format(
                path, colour(index), name
            )
        )
    named = list(series) if len(series) <= MOST_NAMED else []
    return _figure(width, height, parts, title) + legend(named)


def heat_map(
    matrix: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    form: str,
    breaks: Sequence[int] = (),
    low: float | None = None,
    high: float | None = None,
    cell: int = 0,
) -> Markup:
    """A matrix as coloured cells, with numbers where there is room; `breaks` draws lines before these rows and columns.

    Args:
        form: format of a number, such as ".2f".
        low, high: ends of the colour scale; default the least and the largest number.
        cell: width of a cell in pixels; default: what fits the page.
    """
    flat = [value for row in matrix for value in row]
    low, high = min(flat) if low is None else low, max(flat) if high is None else high
    labelled = max(len(rows), len(columns)) <= MOST_LABELLED
    cell = cell or (44 if labelled else max(4, 640 // len(columns)))
    tall = min(cell, 26)
    # Long names of columns stand aslant.
    slant = labelled and max(map(len, columns)) > cell // 7
    left, top = 4, 26
    if labelled:
        left = 12 + 7 * min(max(map(len, rows)), MOST_LETTERS)
        top = 36 + 5 * min(max(map(len, columns)), MOST_LETTERS) if slant else 42
    parts = [_text(4, 14, title, "title")]
    for i, row in enumerate(matrix):
        y = top + i * tall
        if labelled:
            parts.append(_text(left - 5, y + tall / 2 + 4, _short(rows[i]), "tick end"))
        for j, value in enumerate(row):
            parts.append(_cell(left + j * cell, y, cell, tall, value, low, high, form if labelled else ""))
    if labelled:
        label = Markup('<text class="tick {}" transform="translate({:.1f} {}) rotate({})">{}</text>')
        turn = ("", -45) if slant else ("middle", 0)
        for j, name in enumerate(columns):
            parts.append(label.format(turn[0], left + (j + 0.5) * cell, top - 6, turn[1], _short(name)))
    right, low_edge = left + len(columns) * cell, top + len(rows) * tall
    for place in breaks:
        parts.append(_line(left, top + place * tall, right, top + place * tall, "break"))
        parts.append(_line(left + place * cell, top, left + place * cell, low_edge, "break"))
    width = right + (5 * min(len(columns[-1]), MOST_LETTERS) if slant else 4)
    return _figure(max(width, 7 * len(title) + 10), low_edge + 6, parts, title)


def grouped_bars(
    groups: Sequence[str], series: Mapping[str, Sequence[float | None]], title: str, form: str
) -> Markup:
    """Horizontal bars: for each group one bar per series, its number beside it; None leaves the bar out."""
    width, bar, left = 1000, 15, 130
    longest = max(value for values in series.values() for value in values if value is not None)
    parts, y = [_text(4, 16, title, "title")], 32
    for g, group in enumerate(groups):
        parts.append(_text(left - 10, y + bar * len(series) / 2 + 3, _short(group, 17), "label end"))
        for s, values in enumerate(series.values()):
            value = values[g]
            if value is not None:
                reach = value / longest * (width - left - 60)
                box = Markup('<rect x="{}" y="{}" width="{:.1f}" height="{}" rx="2" fill="{}"/>')
                parts.append(box.format(left, y + 1.5, reach, bar - 3, colour(s)))
                parts.append(_text(left + reach + 6, y + bar - 3.5, format(value, form), "tick"))
            y += bar
        y += 12
    return _figure(width, y, parts, title) + legend(list(series))


def legend(names: Sequence[str]) -> Markup:
    """Names beside the colours of their series."""
    item = Markup('<span><i style="background:{}"></i>{}</span>')
    items = Markup("").join(item.format(colour(i), name) for i, name in enumerate(names))
    return Markup('<div class="legend">{}</div>').format(items)


def _cell(
    x: float, y: float, width: float, height: float, value: float, low: float, high: float, form: str
) -> Markup:
    share = (value - low) / (high - low) if high > low else 0.5
    share = min(max(share, 0.0), 1.0)
    fill = to_hex(colormaps["Blues"](share))
    box = Markup('<rect x="{}" y="{}" width="{}" height="{}" fill="{}"/>').format(x, y, width, height, fill)
    if not form:
        return box
    ink = "#fff" if share > 0.55 else "#12263a"
    number = Markup('<text x="{}" y="{}" class="cell" style="fill:{}">{}</text>')
    return box + number.format(x + width / 2, y + height / 2 + 4, ink, format(value, form))


def _text(x: float, y: float, text: str, kind: str) -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" class="{}">{}</text>').format(x, y, kind, text)


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    return Markup('<line x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}" class="{}"/>').format(
        x1, y1, x2, y2, kind
    )


def _figure(width: float, height: float, parts: Sequence[Markup], label: str) -> Markup:
    frame = Markup('<svg viewBox="0 0 {} {}" width="{}" role="img" aria-label="{}">{}</svg>')
    return frame.format(width, height, width, label, Markup("").join(parts))


def _short(name: str, most: int = MOST_LETTERS) -> str:
    return name if len(name) <= most else name[: max(most - 1, 1)] + "…"
