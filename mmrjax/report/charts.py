"""Small SVG charts for the report: lines, intervals, histograms and the colour bar.

A chart takes a few kilobytes without a plotting library, and its text stays text. Its colours are
CSS classes of templates/report.css, so that the same drawing serves light, dark and print. Every
chart is 360 units wide, about the width of a phone, and scales up from there.

Each function returns `markupsafe.Markup`; every text that comes from a data set is escaped.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup, escape

from mmrjax.report import pictures

WIDTH = 360
PLOT_HEIGHT = 236
LEFT, RIGHT, TOP, BOTTOM = 42, 10, 10, 38
SERIES_COLOURS = 8  # classes s0 … s7 of report.css: domains and seeds; then again with dashes
METHOD_COLOURS = 4  # classes m0 … m3: methods
MAX_POINTS = 240  # points of a line; more are invisible at this size
BINS = 36


@dataclasses.dataclass(frozen=True)
class Line:
    """One curve: x and y of equal length, and its CSS class, see `series_class`."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    css: str


@dataclasses.dataclass(frozen=True)
class Interval:
    """A value with its interval; low = high = None without an interval."""

    value: float
    low: float | None
    high: float | None
    css: str


@dataclasses.dataclass(frozen=True)
class Axis:
    """Maps values to the pixels start … stop of a chart."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Position of a value in SVG units."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return self.start + (value - low) / (high - low) * (self.stop - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        """Round values inside the axis, about `count` of them."""
        if self.log:
            steps = (1, 2, 5) if self.high / self.low < 100 else (1,)
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            values = [step * 10.0**power for power in powers for step in steps]
            inside = [value for value in values if self.low <= value <= self.high]
            return inside if len(inside) > 1 else dataclasses.replace(self, log=False).ticks(count)
        rough = (self.high - self.low) / count
        power = 10.0 ** math.floor(math.log10(rough))
        step = power * next(m for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]


def series_class(index: int) -> str:
    """CSS class of the index-th domain or seed: eight colours, then the same eight dashed."""
    return f"s{index % SERIES_COLOURS}" + (" dashed" if index >= SERIES_COLOURS else "")


def method_class(index: int) -> str:
    """CSS class of the index-th method; its colours mean neither a domain nor good or defective."""
    return f"m{index % METHOD_COLOURS}"


def line_chart(
    lines: Sequence[Line],
    title: str,
    x_label: str,
    y_label: str,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    log_y: bool = False,
    diagonal: bool = False,
) -> Markup:
    """Curves over two axes.

    Args:
        lines: at least one; points not finite (or, on a log axis, not positive) are left out.
        title: read aloud by screen readers and shown on hover.
        x_label: under the x axis.
        y_label: beside the y axis.
        x_range: limits of the x axis, from the data when None. Curves are cut there.
        y_range: limits of the y axis.
        log_y: logarithmic y axis.
        diagonal: draws y = x, the curve of a coin toss.
    """
    points = [_clean(line, x_range, log_y) for line in lines]
    every = np.concatenate([*points, np.empty((0, 2))])
    x_low, x_high = x_range or _limits(every[:, 0])
    y_low, y_high = y_range or _limits(every[:, 1], log=log_y)
    x_axis = Axis(x_low, x_high, LEFT, WIDTH - RIGHT)
    y_axis = Axis(y_low, y_high, PLOT_HEIGHT - BOTTOM, TOP, log=log_y)
    parts = [_x_grid(x_axis, TOP, PLOT_HEIGHT - BOTTOM, x_label), _y_grid(y_axis, y_label)]
    if diagonal:
        low, high = max(x_low, y_low), min(x_high, y_high)
        ends = [(x_axis(v), y_axis(v)) for v in (low, high)]
        parts.append(Markup('<path class="chance" d="{}"/>').format(_path(ends)))
    for line, xy in zip(lines, points, strict=True):
        places = [(x_axis(x), y_axis(min(max(y, y_low), y_high))) for x, y in xy]
        if len(places) == 1:
            (x, y), shape = places[0], '<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="3">'
            shape = Markup(shape).format(line.css, x, y)
        else:
            shape = Markup('<path class="line {}" d="{}">').format(line.css, _path(places))
        tag = "circle" if len(places) == 1 else "path"
        parts.append(shape + Markup("<title>{}</title></{}>").format(line.label, Markup(tag)))
    return _svg(PLOT_HEIGHT, title, parts)


def interval_chart(
    rows: Sequence[tuple[str, Sequence[Interval]]],
    title: str,
    x_label: str,
    zero_line: float | None = None,
) -> Markup:
    """A dot with its interval per row and series.

    Args:
        rows: (label, intervals); the intervals of a row are drawn below each other.
        title: read aloud by screen readers.
        x_label: under the axis.
        zero_line: value of a reference line, for differences 0, for AUROC 50.
    """
    longest = max((len(label) for label, _ in rows), default=0)
    left = min(132, 16 + 6.2 * longest)
    step, pad = 11, 9
    heights = [pad + step * max(1, len(intervals)) for _, intervals in rows]
    bottom = TOP + sum(heights)
    values = [v for _, some in rows for i in some for v in (i.value, i.low, i.high)]
    values = [v for v in [*values, zero_line] if v is not None]
    axis = Axis(*_limits(np.array(values)), left, WIDTH - RIGHT)
    parts = [_x_grid(axis, TOP, bottom, x_label)]
    if zero_line is not None:
        x = axis(zero_line)
        parts.append(Markup('<path class="chance" d="{}"/>').format(_path([(x, TOP), (x, bottom)])))
    y = TOP
    for (label, intervals), height in zip(rows, heights, strict=True):
        middle = y + height / 2
        parts.append(_text(left - 8, middle + 4, _shorten(label, 20), "label end"))
        for place, interval in enumerate(intervals):
            row_y = middle + step * (place - (len(intervals) - 1) / 2)
            if interval.low is not None and interval.high is not None:
                ends = _path([(axis(interval.low), row_y), (axis(interval.high), row_y)])
                whisker = '<path class="whisker {}" d="{}"/>'
                parts.append(Markup(whisker).format(interval.css, ends))
            dot = '<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="3.6"/>'
            parts.append(Markup(dot).format(interval.css, axis(interval.value), row_y))
        y += height
    return _svg(bottom + BOTTOM, title, parts)


def histogram_chart(
    rows: Sequence[tuple[str, np.ndarray, np.ndarray]], title: str, x_label: str
) -> Markup:
    """Scores of good and of defective images, one row per domain on one common axis.

    The bars of a class add up to 1 in each row, so many good images cannot hide a few defective
    images. A short line marks the median of the good images. The last bin takes everything beyond
    the 99.5 % quantile.

    Args:
        rows: (domain, good scores, defective scores), finite float arrays; either may be empty.
        title: read aloud by screen readers.
        x_label: under the axis.
    """
    every = np.concatenate([part for _, good, bad in rows for part in (good, bad)])
    low, high = float(every.min()), float(np.quantile(every, 0.995))
    if high <= low:
        low, high = _limits(np.array([low, float(every.max())]))
    axis = Axis(low, high, 12, WIDTH - RIGHT)
    row_height, head = 46, 16
    bottom = TOP + len(rows) * (row_height + head)
    parts = [_x_grid(axis, TOP, bottom, x_label)]
    for place, (label, good, bad) in enumerate(rows):
        base = TOP + (place + 1) * (row_height + head)
        shares = [_shares(values, low, high) for values in (good, bad)]
        top_share = max(float(share.max()) for share in shares) or 1.0
        for share, css in zip(shares, ("good", "bad"), strict=True):
            heights = share / top_share * row_height
            parts.append(
                Markup('<path class="bars {}" d="{}"/>').format(css, _steps(heights, base))
            )
        if good.size:
            x = axis(min(max(float(np.median(good)), low), high))
            ends = _path([(x, base - row_height - 2), (x, base)])
            parts.append(Markup('<path class="median" d="{}"/>').format(ends))
        parts.append(_text(12, base - row_height - 5, _shorten(label, 30), "label"))
        counts = f"{good.size} good, {bad.size} defective"
        parts.append(_text(WIDTH - RIGHT, base - row_height - 5, counts, "tick end"))
    return _svg(bottom + BOTTOM, title, parts)


def colour_bar(scale: tuple[float, float]) -> Markup:
    """The fixed colour scale of the heat maps, with the same opacity as on the pictures."""
    position = np.linspace(0, 1, 60)
    colours, opacity = pictures.colour_and_opacity(position)
    step = (WIDTH - 2 * RIGHT) / position.size
    grey = Markup('<rect class="grey" x="{}" y="4" width="{}" height="14"/>')
    parts = [grey.format(RIGHT, WIDTH - 2 * RIGHT)]
    for place, (colour, alpha) in enumerate(zip(colours, opacity, strict=True)):
        rect = '<rect x="{:.1f}" y="4" width="{:.1f}" height="14" fill="{}" fill-opacity="{:.2f}"/>'
        hexadecimal = "#" + bytes(colour).hex()
        parts.append(Markup(rect).format(RIGHT + place * step, step + 0.2, hexadecimal, alpha))
    axis = Axis(scale[0], scale[1], RIGHT, WIDTH - RIGHT)
    labels = [(scale[0], "label"), (scale[1], "label end")]
    parts += [_text(axis(v), 32, f"{v:.4g}", css) for v, css in labels]
    parts.append(_text(WIDTH / 2, 32, "anomaly score per pixel", "tick middle"))
    return _svg(38, f"Colour scale from {scale[0]:.4g} to {scale[1]:.4g}", parts)


def _clean(line: Line, x_range: tuple[float, float] | None, positive: bool) -> np.ndarray:
    """Finite points [n, 2] of a line, cut at the right end of the axis, at most MAX_POINTS."""
    xy = np.array([(x, y) for x, y in zip(line.x, line.y, strict=False) if None not in (x, y)])
    xy = xy.reshape(-1, 2).astype(np.float64)
    xy = xy[np.isfinite(xy).all(axis=1)]
    if positive:
        xy = xy[xy[:, 1] > 0]
    if x_range is not None and len(xy) and xy[-1, 0] > x_range[1]:
        end = (x_range[1], np.interp(x_range[1], xy[:, 0], xy[:, 1]))
        xy = np.concatenate([xy[xy[:, 0] < x_range[1]], [end]])
    if len(xy) > MAX_POINTS:
        xy = xy[np.unique(np.linspace(0, len(xy) - 1, MAX_POINTS).round().astype(int))]
    return xy


def _limits(values: np.ndarray, log: bool = False) -> tuple[float, float]:
    """Axis limits around values, with a little air; never of zero width."""
    if values.size == 0:
        return (0.1, 1.0) if log else (0.0, 1.0)
    low, high = float(values.min()), float(values.max())
    if log:
        return low / 1.1, high * 1.1
    air = 0.05 * (high - low) or max(0.5 * abs(high), 1e-6)
    return low - air, high + air


def _shares(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Share of the values per bin [BINS]; values beyond the ends go to the outer bins."""
    counts, _ = np.histogram(np.clip(values, low, high), bins=BINS, range=(low, high))
    return counts / max(1, values.size)


def _steps(heights: np.ndarray, base: float) -> str:
    """Outline of histogram bars standing on `base`."""
    step = (WIDTH - RIGHT - 12) / len(heights)
    places = [(12.0, base)]
    for index, height in enumerate(heights):
        places += [(12 + index * step, base - height), (12 + (index + 1) * step, base - height)]
    return _path([*places, (WIDTH - RIGHT, base)])


def _x_grid(axis: Axis, top: float, bottom: float, label: str) -> Markup:
    """Vertical grid lines with tick labels, and the axis label."""
    parts = []
    ticks = axis.ticks()
    for tick in ticks:
        x = axis(tick)
        parts.append(Markup('<path class="grid" d="{}"/>').format(_path([(x, top), (x, bottom)])))
        parts.append(_text(x, bottom + 14, _tick_text(tick, ticks), "tick middle"))
    parts.append(_text((axis.start + axis.stop) / 2, bottom + 30, label, "label middle"))
    return Markup("").join(parts)


def _y_grid(axis: Axis, label: str) -> Markup:
    """Horizontal grid lines with tick labels, and the turned axis label."""
    parts = []
    ticks = axis.ticks()
    for tick in ticks:
        y = axis(tick)
        ends = _path([(LEFT, y), (WIDTH - RIGHT, y)])
        parts.append(Markup('<path class="grid" d="{}"/>').format(ends))
        text = f"{tick:g}" if axis.log else _tick_text(tick, ticks)
        parts.append(_text(LEFT - 5, y + 3.5, text, "tick end"))
    middle = (axis.start + axis.stop) / 2
    turned = '<text class="label middle" transform="translate(10 {:.1f}) rotate(-90)">{}</text>'
    parts.append(Markup(turned).format(middle, label))
    return Markup("").join(parts)


def _tick_text(tick: float, ticks: Sequence[float]) -> str:
    """A tick's number with the decimals that its neighbours need."""
    gap = min((abs(b - a) for a, b in itertools.pairwise(ticks)), default=abs(tick) or 1)
    largest = max(abs(t) for t in ticks)
    if largest >= 1e5 or largest < 1e-3:
        return f"{tick:.3g}"
    decimals = max(0, -math.floor(math.log10(gap) + 1e-9))
    if abs(gap * 10**decimals - round(gap * 10**decimals)) > 1e-6:  # a step of 2.5
        decimals += 1
    return f"{tick:.{decimals}f}".replace("-", "\N{MINUS SIGN}")


def _shorten(text: str, length: int) -> str:
    """The text, or its beginning and an ellipsis."""
    return text if len(text) <= length else text[: length - 1] + "…"


def _text(x: float, y: float, text: str, css: str) -> Markup:
    """A text element at one place."""
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}">{}</text>').format(css, x, y, text)


def _path(places: Sequence[tuple[float, float]]) -> str:
    """Path data through the places, in tenths of a unit, without repeated points."""
    texts = [f"{x:.1f} {y:.1f}" for x, y in places]
    texts = [t for t, before in zip(texts, [None, *texts], strict=False) if t != before]
    return "M" + "L".join(texts)


def _svg(height: float, title: str, parts: Sequence[Markup]) -> Markup:
    """The SVG element around the parts."""
    head = f'<svg class="chart" viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="'
    return Markup(head) + escape(title) + Markup('">') + Markup("").join(parts) + Markup("</svg>")
