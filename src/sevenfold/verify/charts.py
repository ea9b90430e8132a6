"""The geometry of the report's curves over steps.

Everything is in percent of the drawing's width and height (y downwards, as in SVG), or in path
coordinates of 0 to 1000; the template turns it into SVG. No text of a user passes through here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MAX_BUCKETS = 160
PATH_SIZE = 1000
NUM_LENGTH_COLOURS = 5
# What an event's name takes of a chart as wide as a phone, and from where on it stands on the left.
NAME_PERCENT = 16.0
NAMED_LEFT_FROM = 90.0
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Tick:
    """One labelled place on an axis; ``at`` is in percent."""

    at: float
    label: str


@dataclass(frozen=True, kw_only=True)
class Line:
    """One path in coordinates of 0 to 1000; ``kind`` picks its look in the style sheet."""

    kind: str
    name: str
    path: str


@dataclass(frozen=True, kw_only=True)
class Band:
    """The part of the x axis trained at one context length, in percent."""

    start: float
    width: float
    length: int
    colour: int


@dataclass(frozen=True, kw_only=True)
class Mark:
    """An event at a place on the x axis, in percent; ``is_named`` where its name has room."""

    at: float
    event: str
    step: int
    is_named: bool


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A drawing of one or two quantities over steps, and the sentence that says what it shows."""

    title: str
    note: str
    summary: str
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    lines: Sequence[Line]
    dots: Sequence[str] = ()
    bands: Sequence[Band] = ()
    marks: Sequence[Mark] = ()
    legend: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Maps values to percent, on a plain or a logarithmic scale."""

    low: float
    high: float
    logarithmic: bool = False
    power: int = 0
    ticks: Sequence[float] = field(default=())

    def at(self, value: float) -> float:
        """Return the place of ``value`` in percent of the axis, from its low end."""
        if self.logarithmic:
            low, high = math.log10(self.low), math.log10(self.high)
            return 100 * (math.log10(value) - low) / (high - low)
        return 100 * (value - self.low) / (self.high - self.low)


def finite(value: object) -> float | None:
    """Return ``value`` as a float where it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def series(rows: Sequence[Mapping[str, Any]], key: str) -> list[Point]:
    """Return (step, value) of every row of metrics that has a finite ``key``; events have none."""
    measured = (row for row in rows if not row.get("event"))
    pairs = ((finite(row.get("step")), finite(row.get(key))) for row in measured)
    return [(step, value) for step, value in pairs if step is not None and value is not None]


def round_ticks(low: float, high: float, wanted: int) -> list[float]:
    """Return about ``wanted`` round values (1, 2, 2.5 or 5 times a power of ten) in the range."""
    if high <= low:
        return [low]
    rough = (high - low) / max(wanted, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]


def _logarithmic_ticks(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for digits in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
        ticks = [d * 10.0**p for p in range(first, last + 1) for d in digits]
        ticks = [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]
        if len(ticks) >= 3:
            break
    return ticks[:: math.ceil(len(ticks) / 6)] if len(ticks) > 6 else ticks


def value_axis(values: Sequence[float], *, from_zero: bool, spread: float | None) -> Axis:
    """Choose an axis for ``values``; logarithmic where they span more than ``spread`` times."""
    low, high = min(values), max(values)
    if spread is not None and low > 0 and high / low > spread:
        low, high = low / 1.08, high * 1.08
        ticks = _logarithmic_ticks(low, high)
        if len(ticks) >= 2:
            return Axis(low=low, high=high, logarithmic=True, ticks=ticks)
    if from_zero and low >= 0:
        low = 0.0
    if high <= low:
        margin = abs(high) * 0.1 or 1.0
        low, high = low - margin, high + margin
    ticks = round_ticks(low, high, 4)
    gap = ticks[1] - ticks[0] if len(ticks) > 1 else high - low
    low = low if low == 0 else math.floor(low / gap + 1e-9) * gap
    high = math.ceil(high / gap - 1e-9) * gap
    ticks = round_ticks(low, high, 4)
    power = math.floor(math.log10(max(abs(low), abs(high))))
    return Axis(low=low, high=high, power=power if power < -2 else 0, ticks=ticks)


def axis_label(value: float, axis: Axis) -> str:
    """Return a short label: 12k, 0.25, or the factor of the axis' power of ten."""
    value, largest = value / 10.0**axis.power, max(abs(axis.low), abs(axis.high))
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if largest >= 10 * size and value:
            return f"{value / size:.4g}{unit}"
    return f"{value:,.6g}".replace("-", "\N{MINUS SIGN}")


def bucketed(points: Sequence[Point]) -> list[tuple[float, float, float, float]]:
    """Reduce ``points`` to at most ``MAX_BUCKETS`` of (step, mean, lowest, highest)."""
    size = max(1, math.ceil(len(points) / MAX_BUCKETS))
    buckets = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        values = [value for _, value in part]
        middle = sum(step for step, _ in part) / len(part)
        buckets.append((middle, sum(values) / len(values), min(values), max(values)))
    return buckets


def _path(points: Sequence[Point], x_axis: Axis, y_axis: Axis, *, close: bool = False) -> str:
    places = [
        f"{x_axis.at(x) * PATH_SIZE / 100:.1f},{PATH_SIZE - y_axis.at(y) * PATH_SIZE / 100:.1f}"
        for x, y in points
    ]
    if len(places) == 1:
        return f"M{places[0]}h0"
    return "M" + "L".join(places) + ("Z" if close else "")


def context_lengths(rows: Sequence[Mapping[str, Any]]) -> list[tuple[float, float, int]]:
    """Return (first step, last step, length) of each stretch of one context length."""
    stretches: list[tuple[float, float, int]] = []
    for step, length in series(rows, "seq_len"):
        if stretches and stretches[-1][2] == int(length):
            stretches[-1] = (stretches[-1][0], step, int(length))
        else:
            stretches.append((step, step, int(length)))
    return stretches


def _bands(rows: Sequence[Mapping[str, Any]], x_axis: Axis) -> list[Band]:
    stretches = context_lengths(rows)
    if len({length for _, _, length in stretches}) < 2:
        return []
    lengths = sorted({length for _, _, length in stretches})
    bands = []
    for index, (start, end, length) in enumerate(stretches):
        following = stretches[index + 1][0] if index + 1 < len(stretches) else end
        left, right = max(0.0, x_axis.at(start)), min(100.0, x_axis.at(following))
        colour = min(lengths.index(length), NUM_LENGTH_COLOURS - 1)
        bands.append(Band(start=left, width=right - left, length=length, colour=colour))
    return bands


def _step_axis(rows: Sequence[Mapping[str, Any]]) -> Axis | None:
    steps = [step for row in rows if (step := finite(row.get("step"))) is not None]
    if not steps:
        return None
    low, high = min(steps), max(steps)
    if low < 0.2 * high:
        low = 0.0
    if high <= low:
        low, high = low - 1, high + 1
    return Axis(low=low, high=high, ticks=[t for t in round_ticks(low, high, 4) if t == int(t)])


def _marks(rows: Sequence[Mapping[str, Any]], x_axis: Axis) -> list[Mark]:
    events = [
        (step, str(row["event"]))
        for row in rows
        if row.get("event") and (step := finite(row.get("step"))) is not None
    ]
    marks: list[Mark] = []
    free_from = 0.0
    for step, event in sorted(events):
        at = x_axis.at(step)
        # Of several that stand close together the first is named.
        is_named = at - (NAME_PERCENT if at > NAMED_LEFT_FROM else 0.0) >= free_from
        if is_named:
            free_from = at + (0.0 if at > NAMED_LEFT_FROM else NAME_PERCENT)
        marks.append(Mark(at=at, event=event, step=int(step), is_named=is_named))
    return marks


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """What one chart draws: a key of the metrics rows, and how."""

    key: str
    title: str
    second_key: str = ""
    second_name: str = ""
    from_zero: bool = False
    spread: float | None = None
    by_length: bool = False


QUANTITIES = (
    Quantity(
        key="loss",
        title="Loss",
        second_key="validation_loss",
        second_name="held out",
        spread=3.0,
    ),
    Quantity(key="accuracy", title="Pairs ranked right", from_zero=True),
    Quantity(key="margin", title="Reward margin, nats"),
    Quantity(key="lr", title="Learning rate", from_zero=True),
    Quantity(key="grad_norm", title="Gradient norm", from_zero=True, spread=20.0),
    Quantity(key="tok_s", title="Tokens per second", from_zero=True, by_length=True),
)


def draw(quantity: Quantity, rows: Sequence[Mapping[str, Any]]) -> Chart | None:
    """Draw one quantity over all steps of ``rows``; None where no row has it."""
    points = series(rows, quantity.key)
    second = series(rows, quantity.second_key) if quantity.second_key else []
    x_axis = _step_axis(rows)
    if x_axis is None or not points + second:
        return None
    values = [value for _, value in points + second]
    y_axis = value_axis(values, from_zero=quantity.from_zero, spread=quantity.spread)
    bands = _bands(rows, x_axis)
    buckets = bucketed(points)
    thinned = len(buckets) < len(points)
    if quantity.by_length and bands:
        lines = list(_lines_by_length(rows, quantity.key, x_axis, y_axis))
    else:
        lines = list(_mean_lines(buckets, x_axis, y_axis, with_range=thinned))
    legend = list(dict.fromkeys((line.kind, line.name) for line in lines))
    dots: list[str] = []
    if second:
        lines.append(
            Line(kind="second", name=quantity.second_name, path=_path(second, x_axis, y_axis))
        )
        if len(second) <= 60:
            dots = [_path([point], x_axis, y_axis) for point in second]
        legend.append(("second", quantity.second_name))
    return Chart(
        title=quantity.title,
        note=_note(y_axis),
        summary=_summary(quantity, points, second),
        x_ticks=[Tick(at=x_axis.at(t), label=axis_label(t, x_axis)) for t in x_axis.ticks],
        y_ticks=[Tick(at=100 - y_axis.at(t), label=axis_label(t, y_axis)) for t in y_axis.ticks],
        lines=lines,
        dots=dots,
        bands=bands,
        marks=_marks(rows, x_axis) if quantity.key == "loss" else (),
        legend=legend if second or len({kind for kind, _ in legend} - {"range", "mean"}) else (),
    )


def _mean_lines(
    buckets: Sequence[tuple[float, float, float, float]],
    x_axis: Axis,
    y_axis: Axis,
    *,
    with_range: bool,
) -> Iterator[Line]:
    if not buckets:
        return
    if with_range:
        above = [(step, highest) for step, _, _, highest in buckets]
        below = [(step, lowest) for step, _, lowest, _ in reversed(buckets)]
        outline = _path(above + below, x_axis, y_axis, close=True)
        yield Line(kind="range", name="range", path=outline)
    means = [(step, mean) for step, mean, _, _ in buckets]
    name = "mean" if with_range else "training"
    yield Line(kind="mean", name=name, path=_path(means, x_axis, y_axis))


def _lines_by_length(
    rows: Sequence[Mapping[str, Any]], key: str, x_axis: Axis, y_axis: Axis
) -> Iterator[Line]:
    lengths = sorted({length for _, _, length in context_lengths(rows)})
    for start, end, length in context_lengths(rows):
        inside = [point for point in series(rows, key) if start <= point[0] <= end]
        if inside:
            means = [(step, mean) for step, mean, _, _ in bucketed(inside)]
            colour = min(lengths.index(length), NUM_LENGTH_COLOURS - 1)
            path = _path(means, x_axis, y_axis)
            name = f"context {length:,}" if length == lengths[0] else f"{length:,}"
            yield Line(kind=f"length-{colour}", name=name, path=path)


def _note(axis: Axis) -> str:
    if axis.logarithmic:
        return "log scale"
    exponent = str(axis.power).translate(SUPERSCRIPTS)
    return f"\N{MULTIPLICATION SIGN}10{exponent}" if axis.power else ""


def _summary(quantity: Quantity, points: Sequence[Point], second: Sequence[Point]) -> str:
    def told(name: str, values: Sequence[Point]) -> str:
        (first_step, first), (last_step, last) = values[0], values[-1]
        return f"{name}: {first:.4g} at step {first_step:g}, {last:.4g} at step {last_step:g}"

    parts = [told(quantity.title, points)] if points else []
    return "; ".join(parts + ([told(quantity.second_name, second)] if second else []))
