"""The geometry of an interval drawn against its threshold, in percent of the drawing's width."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sevenfold.verify.charts import Axis


@dataclass(frozen=True, kw_only=True)
class IntervalDrawing:
    """An interval on its scale; ``good_start`` and ``good_width`` span the wanted side."""

    low: float
    high: float
    value: float
    threshold: float
    good_start: float
    good_width: float
    threshold_anchor: str
    zero: float | None
    scale_low: str
    scale_high: str


def draw_interval(
    *,
    value: float,
    low: float,
    high: float,
    threshold: float,
    at_least: bool,
    include_zero: bool,
    write: Callable[[float], str],
) -> IntervalDrawing:
    """Place an interval and its threshold on a common scale.

    The scale is 0 to 1 where everything lies there, so that proportions compare across rows;
    otherwise, and for differences (``include_zero``), it is the range of the numbers with room on
    both sides.
    """
    numbers = (value, low, high, threshold, *((0.0,) if include_zero else ()))
    start, end = min(numbers), max(numbers)
    if start >= 0 and end <= 1 and not include_zero:
        start, end = 0.0, 1.0
    else:
        room = (end - start) * 0.25 or abs(end) * 0.25 or 1.0
        start, end = start - room, end + room
        if min(numbers) >= 0 and not include_zero:
            start = max(0.0, start)
    axis = Axis(low=start, high=end)
    line = axis.at(threshold)
    anchor = "start" if line < 12 else "end" if line > 88 else "middle"
    return IntervalDrawing(
        low=axis.at(low),
        high=axis.at(high),
        value=axis.at(value),
        threshold=line,
        good_start=line if at_least else 0.0,
        good_width=100 - line if at_least else line,
        threshold_anchor=anchor,
        zero=axis.at(0.0) if include_zero else None,
        scale_low="" if line < 18 else write(start),
        scale_high="" if line > 82 else write(end),
    )
