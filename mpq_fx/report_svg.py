"""numbers -> pictures: small SVG drawings that take their colors from the page's style sheet"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 250
CHARACTER = 6.4  # width of one in the font of the page
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 10, 36


@dataclass(frozen=True)
class Bar:
    """A labeled amount; `before` is drawn behind it, pale."""

    label: str
    value: float
    kind: str  # a class of the style sheet: "c0", "c1", … one per choice
    tip: str
    before: float = 0.0


@dataclass(frozen=True)
class Dot:
    x: float
    y: float
    kind: str
    tip: str
    large: bool = False


@dataclass(frozen=True)
class Axis:
    """Data -> pixels; a logarithmic axis for positive data of several magnitudes."""

    low: float
    high: float
    begin: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (
            map(math.log10, (self.low, self.high, max(value, self.low)))
            if self.log
            else (self.low, self.high, value)
        )
        return self.begin + (at - low) / (high - low) * (self.end - self.begin)

    @property
    def ticks(self) -> list[float]:
        if self.log:
            return _log_ticks(self.low, self.high)
        step = _nice((self.high - self.low) / 5)
        first = math.ceil(self.low / step - 1e-9)
        return [k * step for k in range(first, math.floor(self.high / step + 1e-9) + 1)]


def columns(title: str, bars: Sequence[Bar], label: str) -> str:
    """One thin column per site, in the order of the graph."""
    top = max((max(bar.value, bar.before) for bar in bars), default=0.0) or 1.0
    y = Axis(0.0, top * 1.04, HEIGHT - BOTTOM, TOP)
    slot = (WIDTH - LEFT - RIGHT) / max(len(bars), 1)
    thick, parts = max(min(slot * 0.78, 28.0), 1.0), list(_grid_y(y, label))
    for k, bar in enumerate(bars):
        x = LEFT + (k + 0.5) * slot - thick / 2
        tip = f"<title>{escape(bar.tip)}</title>"
        rects = (("before", bar.before), (bar.kind, bar.value))
        drawn = "".join(
            f'<rect class="{kind}" x="{x:.1f}" y="{y(v):.1f}" width="{thick:.1f}" '
            f'height="{max(y(0.0) - y(v), 0.0):.1f}"/>'
            for kind, v in rects
            if v > 0
        )
        parts.append(f"<g>{tip}{drawn}</g>")
    parts.append(
        _text(
            LEFT + (WIDTH - LEFT - RIGHT) / 2,
            HEIGHT - 8,
            f"{len(bars)} sites, first to last",
            "middle",
        )
    )
    return _svg(title, HEIGHT, parts)


def rows(title: str, bars: Sequence[Bar], unit: str) -> str:
    """One thick row per variant or stage: label, bar, number."""
    top = max((bar.value for bar in bars), default=0.0) or 1.0
    longest = max((len(bar.label) for bar in bars), default=0)
    left, right, step = max(110, 16 + CHARACTER * longest), 190, 30
    x = Axis(0.0, top, left, WIDTH - right)
    parts = []
    for k, bar in enumerate(bars):
        y = k * step + 6
        parts.append(
            f"<g><title>{escape(bar.tip)}</title>"
            + _text(left - 10, y + 14, bar.label, "end")
            + f'<rect class="{bar.kind}" rx="3" x="{left}" y="{y}" '
            f'width="{max(x(bar.value) - left, 1.5):.1f}" height="20"/>'
            + _text(x(bar.value) + 8, y + 14, f"{bar.value:.3g} {unit}{bar.tip}", "start")
            + "</g>"
        )
    return _svg(title, len(bars) * step + 6, parts)


def stacked(title: str, bars: Sequence[Bar]) -> str:
    """One bar of shares that add up to 1."""
    x, parts, whole = 0.0, [], 2 * WIDTH  # it spans both columns of the page
    for bar in bars:
        width = bar.value * whole
        parts.append(
            f'<g><title>{escape(bar.tip)}</title><rect class="{bar.kind}" x="{x:.1f}" '
            f'y="0" width="{max(width - 1.5, 0.0):.1f}" height="22" rx="2"/>'
        )
        if width > 60:
            parts.append(
                f'<text class="on" x="{x + width / 2:.1f}" y="15.5" '
                f'text-anchor="middle">{bar.value:.0%}</text>'
            )
        parts.append("</g>")
        x += width
    return _svg(title, 22, parts, whole)


def frontier(title: str, dots: Sequence[Dot], labels: tuple[str, str], line: float | None) -> str:
    """Dots joined in their order, and a horizontal rule at `line`; both axes begin at zero."""
    x = _linear([dot.x for dot in dots], LEFT, WIDTH - RIGHT)
    y = _linear([dot.y for dot in dots] + ([] if line is None else [line]), HEIGHT - BOTTOM, TOP)
    path = " ".join(f"{x(dot.x):.1f},{y(dot.y):.1f}" for dot in dots if not dot.large)
    parts = [*_grid_y(y, labels[1]), *_grid_x(x, labels[0])]
    parts += [] if line is None else [_rule((LEFT, y(line)), (WIDTH - RIGHT, y(line)))]
    parts.append(f'<polyline class="path" points="{path}"/>')
    return _svg(title, HEIGHT, [*parts, *_circles(dots, x, y)])


def _circles(dots: Sequence[Dot], x: Axis, y: Axis) -> Iterator[str]:
    for dot in sorted(dots, key=lambda dot: dot.large):
        yield (
            f'<circle class="{dot.kind}" cx="{x(dot.x):.1f}" cy="{y(dot.y):.1f}" '
            f'r="{7 if dot.large else 4}"><title>{escape(dot.tip)}</title></circle>'
        )


def _linear(values: Sequence[float], begin: float, end: float) -> Axis:
    return Axis(0.0, max(values) * 1.06 or 1.0, begin, end)


def _log_ticks(low: float, high: float) -> list[float]:
    """Decades, with 2 and 5 between them where there are fewer than three."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    whole = [10.0**e for e in decades if low <= 10.0**e <= high]
    if len(whole) >= 3:
        return whole
    return [m * 10.0**e for e in decades for m in (1, 2, 5) if low <= m * 10.0**e <= high]


def _nice(step: float) -> float:
    """The next of 1, 2, 5, 10, … that is at least `step`."""
    unit = 10.0 ** math.floor(math.log10(step))
    return next(m * unit for m in (1, 2, 5, 10) if m * unit >= step * (1 - 1e-9))


def _grid_y(y: Axis, label: str) -> Iterator[str]:
    for tick in y.ticks:
        at, ends = f"{y(tick):.1f}", f'x1="{LEFT}" x2="{WIDTH - RIGHT}"'
        yield f'<line class="grid" {ends} y1="{at}" y2="{at}"/>'
        yield _text(LEFT - 6, y(tick) + 4, f"{tick:.4g}", "end")
    middle = (TOP + HEIGHT - BOTTOM) / 2
    yield (
        f'<text class="axis" text-anchor="middle" '
        f'transform="translate(12 {middle:.0f}) rotate(-90)">{escape(label)}</text>'
    )


def _grid_x(x: Axis, label: str) -> Iterator[str]:
    for tick in x.ticks:
        yield _text(x(tick), HEIGHT - BOTTOM + 15, f"{tick:.4g}", "middle")
    yield _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 5, label, "middle")


def _rule(start: tuple[float, float], end: tuple[float, float]) -> str:
    (x1, y1), (x2, y2) = start, end
    return f'<line class="rule" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, words: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _svg(title: str, height: float, parts: Sequence[str], width: float = WIDTH) -> str:
    return (
        f'<svg role="img" viewBox="0 0 {width} {height}" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )
