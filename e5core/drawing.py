"""Charts as inline SVG, drawn by hand: lines over steps, and histograms.  Colours are the page's CSS variables.

A chart is 360 units wide and its column about as many pixels, on a desk and on a phone alike, so its text keeps its
size. Every point and bin says its figures in a <title>, which browsers show under the pointer and readers read aloud.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from statistics import fmean, median

from e5core.page import Markup, escaped

WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 54, 352, 8, 162  # of the field inside the axes
MOST_POINTS = 200  # drawn; more are taken together, with the band from their lowest to their highest
SMOOTH_FROM = 60  # points, from which the running median is drawn too
N_BINS = 36
Point = tuple[float, float]
Bucket = tuple[float, float, float, float]  # place, mean, lowest, highest


def number(value: float) -> str:
    """Write a number with three sensible digits: 0.0000533 as 5.33e-5, 17.026 as 17, 1770 as 1,770."""
    size = abs(value)
    if value == 0 or size >= 100:
        return f"{value:,.0f}"
    if size < 1e-4:
        digits, _, exponent = f"{value:.2e}".partition("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"
    text = f"{value:.{max(0, 2 - math.floor(math.log10(size)))}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def line_chart(
    points: Sequence[Point], *, name: str, mark: tuple[float, str] | None = None, log: bool = False
) -> Markup:
    """Draw one value over steps.

    points: (step, value), steps rising, at least one.  mark: a value worth a dashed line, and its name.
    log: a logarithmic axis, where a value that is not positive lies on its lower end; else the axis begins at 0, or
    below at the lowest value.
    """
    buckets = _buckets(points)
    values = [value for _, value in points] + ([mark[0]] if mark else [])
    ticks = _log_ticks(values) if log else nice_ticks(min(0.0, *values), max(values))
    y = _scale(ticks[0], ticks[-1], BOTTOM, TOP, log)
    first, last = points[0][0], points[-1][0]
    x = _scale(first, last if last > first else first + 1, LEFT + 6, RIGHT - 6)
    parts = [_y_axis(ticks, y), _step_axis(first, last, x)]
    if any(low < high for _, _, low, high in buckets):
        edge = [(x(place), y(high)) for place, _, _, high in buckets]
        edge += [(x(place), y(low)) for place, _, low, _ in reversed(buckets)]
        parts.append(f'<polygon class="band" points="{_path(edge)}"/>')
    drawn = [(x(place), y(mean)) for place, mean, _, _ in buckets]
    smooth = len(points) >= SMOOTH_FROM
    parts.append(f'<polyline class="line{" faint" if smooth else ""}" points="{_path(drawn)}"/>')
    if smooth:
        middles = _running_median([mean for _, mean, _, _ in buckets], len(buckets) // 15)
        trend = [(place, y(middle)) for (place, _), middle in zip(drawn, middles, strict=True)]
        parts.append(f'<polyline class="line" points="{_path(trend)}"/>')
    elif len(points) <= 40:
        parts += [f'<circle class="dot" cx="{a:.1f}" cy="{b:.1f}" r="2.2"/>' for a, b in drawn]
    if mark:
        height = y(mark[0])
        parts.append(f'<line class="mark" x1="{LEFT}" x2="{RIGHT}" y1="{height:.1f}" y2="{height:.1f}"/>')
        beside = [b - height for a, b in drawn if a > RIGHT - 90]  # as far as a name reaches
        above = height - 5 > TOP + 8 and not any(-18 < distance <= 0 for distance in beside)
        place = height - 5 if above or height + 13 > BOTTOM else height + 13
        parts.append(
            f'<text class="marked" x="{RIGHT - 2}" y="{place:.1f}" text-anchor="end">{escaped(mark[1])}</text>'
        )
    return _chart(parts + _hover(buckets, drawn), f"{name} over steps {number(first)} to {number(last)}")


def histogram(groups: Mapping[str, Sequence[float]], *, name: str) -> Markup:
    """Draw how values of groups lie, each as shares of its own number, so that groups of unlike size compare.

    groups: by what they are called, in the order of the page's colours; one without a value is not drawn, and keeps its
    colour.
    """
    everything = [value for values in groups.values() for value in values]
    ticks = nice_ticks(min(everything), max(everything), from_zero=False)
    low, width = ticks[0], (ticks[-1] - ticks[0]) / N_BINS
    shares: list[list[float]] = []
    for values in groups.values():
        counts = [0] * N_BINS
        for value in values:
            counts[min(N_BINS - 1, int((value - low) / width))] += 1
        shares.append([100 * count / max(1, len(values)) for count in counts])
    heights = nice_ticks(0.0, max(map(max, shares)))
    x, y = _scale(ticks[0], ticks[-1], LEFT, RIGHT), _scale(heights[0], heights[-1], BOTTOM, TOP)
    parts = [_y_axis(heights, y, "%")]
    parts += [f'<text x="{x(tick):.1f}" y="{BOTTOM + 16}" text-anchor="middle">{number(tick)}</text>' for tick in ticks]
    parts.append(_x_name("cosine similarity"))
    drawn = [place for place, share in enumerate(shares) if any(share)]
    for place in reversed(drawn):  # the first group lies on top
        corners = [(x(low), y(0))]
        for i, share in enumerate(shares[place]):
            corners += [(x(low + i * width), y(share)), (x(low + (i + 1) * width), y(share))]
        parts.append(f'<polygon class="heap heap{place}" points="{_path([*corners, (x(ticks[-1]), y(0))])}"/>')
    for i in range(N_BINS):
        said = "; ".join(f"{list(groups)[place]} {shares[place][i]:.1f}%" for place in drawn)
        title = f"{number(low + i * width)} to {number(low + (i + 1) * width)}: {said}"
        parts.append(_column(x(low + i * width), x(low + (i + 1) * width), title))
    return _chart(parts, name)


def nice_ticks(low: float, high: float, from_zero: bool = True) -> list[float]:
    """Return 3 to 7 round numbers that enclose low and high; at least two, also where these are equal."""
    if high <= low:
        low, high = (low, low + (abs(low) or 1.0)) if from_zero else (low - 0.05, low + 0.05)
    rough = (high - low) / 4
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(nice * magnitude for nice in (1, 2, 2.5, 5, 10) if nice * magnitude >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _log_ticks(values: Sequence[float]) -> list[float]:
    """Return 1, 2 and 5 times powers of ten that enclose the positive ones of the values, or powers alone if many."""
    positive = [value for value in values if value > 0] or [1.0]
    low, high = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)) + 1e-9)
    high = max(high, low + 1)
    fine = [m * 10.0**e for e in range(low, high) for m in (1, 2, 5)] + [10.0**high]
    inner = [tick for tick in fine if min(positive) < tick < max(positive)]
    lowest = max((tick for tick in fine if tick <= min(positive)), default=fine[0])
    highest = min((tick for tick in fine if tick >= max(positive)), default=fine[-1])
    if len(inner) <= 5 and lowest < highest:
        return [lowest, *inner, highest]
    return [10.0**e for e in range(low, high + 1)]


def _scale(low: float, high: float, start: float, end: float, log: bool = False) -> Callable[[float], float]:
    """Return the map from values low..high to places start..end."""
    if log:
        inner = _scale(math.log10(low), math.log10(high), start, end)
        return lambda value: inner(math.log10(max(value, low)))
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _buckets(points: Sequence[Point]) -> list[Bucket]:
    """Take neighbours together, so that at most MOST_POINTS are left."""
    n = min(len(points), MOST_POINTS)
    bounds = [i * len(points) // n for i in range(n + 1)]
    found = []
    for first, last in pairwise(bounds):
        values = [value for _, value in points[first:last]]
        found.append((fmean(place for place, _ in points[first:last]), fmean(values), min(values), max(values)))
    return found


def _running_median(values: Sequence[float], reach: int) -> list[float]:
    """Take the median of each value and its neighbours, `reach` on either side, fewer at the ends."""
    windows = ((i, min(reach, i, len(values) - 1 - i)) for i in range(len(values)))
    return [median(values[i - near : i + near + 1]) for i, near in windows]


def _hover(buckets: Sequence[Bucket], drawn: Sequence[Point]) -> list[str]:
    """Make a column for the pointer around every point, with what the point is."""
    edges = [LEFT, *((a + b) / 2 for (a, _), (b, _) in pairwise(drawn)), RIGHT]
    titles = []
    for place, mean, low, high in buckets:
        spread = f" ({number(low)} to {number(high)})" if low < high else ""
        titles.append(f"step {place:,.0f}: {number(mean)}{spread}")
    return [_column(first, last, title) for (first, last), title in zip(pairwise(edges), titles, strict=True)]


def _column(first: float, last: float, title: str) -> str:
    box = f'x="{first:.1f}" y="{TOP}" width="{last - first:.1f}" height="{BOTTOM - TOP}"'
    return f'<rect class="hover" {box}><title>{escaped(title)}</title></rect>'


def _y_axis(ticks: Sequence[float], y: Callable[[float], float], unit: str = "") -> str:
    rows = []
    for tick in ticks:
        rows.append(f'<line class="rule" x1="{LEFT}" x2="{RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        rows.append(f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{number(tick)}{unit}</text>')
    return "".join(rows)


def _step_axis(first: float, last: float, x: Callable[[float], float]) -> str:
    shown = sorted({first, last} | {tick for tick in nice_ticks(first, last) if tick == int(tick)})
    room = (last - first) / 10  # a tick nearer than that to an end would touch its label
    kept = [s for s in shown if s in (first, last) or first + room < s < last - room]
    labels = [f'<text x="{x(s):.1f}" y="{BOTTOM + 16}" text-anchor="middle">{s:,.0f}</text>' for s in kept]
    return "".join([*labels, _x_name("step")])


def _x_name(name: str) -> str:
    return f'<text x="{(LEFT + RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{name}</text>'


def _path(points: Sequence[Point]) -> str:
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in points)


def _chart(parts: Sequence[str], name: str) -> Markup:
    opening = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escaped(name)}">'
    return Markup(f"{opening}{''.join(parts)}</svg>")
