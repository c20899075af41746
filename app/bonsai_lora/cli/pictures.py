"""Small pictures as SVG: a heat map of layers and modules, and curves of singular values."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape

_FONT = "font-family='sans-serif' font-size='11' fill='#222'"
_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
_COLD, _NEUTRAL, _WARM = (33, 102, 172), (247, 247, 247), (178, 24, 43)
_LINES = ("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#b07aa1", "#76b7b2", "#9c755f", "#edc948")
_CELL_WIDTH, _CELL_HEIGHT = 64, 16
_WIDTH, _HEIGHT = 640, 360
_LEFT, _TOP = 56, 40
_TICKS = 8
_DECADES = 6
"""Most powers of ten below the largest singular value that are drawn."""


def layer_and_kind(module: str) -> tuple[str, str]:
    """Return the layer number of a module, and the last part of its name."""
    match = _LAYER.search(module)
    return ("" if match is None else match[1]), module.rpartition(".")[2]


def heat_map(title: str, values: Mapping[str, float], least: float, most: float) -> str:
    """Return a table of layers and kinds of modules, each cell with a color for its value."""
    cells = {layer_and_kind(module): value for module, value in values.items()}
    layers = sorted({layer for layer, _ in cells}, key=lambda one: (len(one), one))
    kinds = list(dict.fromkeys(kind for _, kind in cells))
    parts = [_text(_LEFT, 16, title)]
    for column, kind in enumerate(kinds):
        parts.append(_text(_LEFT + (column + 0.5) * _CELL_WIDTH, _TOP - 6, kind, "middle"))
    for row, layer in enumerate(layers):
        top = _TOP + row * _CELL_HEIGHT
        parts.append(_text(_LEFT - 6, top + 12, layer, "end"))
        for column, kind in enumerate(kinds):
            if (layer, kind) in cells:
                value = cells[layer, kind]
                color = _color((value - least) / (most - least))
                label = escape(f"{layer} {kind}: {value:.4g}")
                parts.append(
                    f"<rect x='{_LEFT + column * _CELL_WIDTH}' y='{top}' width='{_CELL_WIDTH - 1}' "
                    f"height='{_CELL_HEIGHT - 1}' fill='{color}'><title>{label}</title></rect>"
                )
    bottom = _TOP + len(layers) * _CELL_HEIGHT
    parts += _scale(bottom + 12, least, most)
    return _picture(_LEFT + max(len(kinds), 4) * _CELL_WIDTH + 16, bottom + 40, parts)


def _scale(top: float, least: float, most: float) -> list[str]:
    """Return a bar of all colors with the values at its ends and in the middle."""
    steps = 32
    width = 4 * _CELL_WIDTH / steps
    parts = [
        f"<rect x='{_LEFT + step * width:g}' y='{top:g}' width='{width:g}' height='8' "
        f"fill='{_color((step + 0.5) / steps)}'/>"
        for step in range(steps)
    ]
    for share in (0.0, 0.5, 1.0):
        place = _LEFT + share * 4 * _CELL_WIDTH
        parts.append(_text(place, top + 20, f"{least + share * (most - least):g}", "middle"))
    return parts


def _color(share: float) -> str:
    """Return the color from blue (0) over white (0.5) to red (1)."""
    share = min(1.0, max(0.0, share))
    ends = (_COLD, _NEUTRAL) if share < 0.5 else (_NEUTRAL, _WARM)
    weight = 2 * share - (share >= 0.5)
    mixed = [round(a + weight * (b - a)) for a, b in zip(*ends, strict=True)]
    return "#" + "".join(f"{one:02x}" for one in mixed)


def curves(title: str, spectra: Mapping[str, Sequence[float]]) -> str:
    """Return the singular values of each module as a line, colored by kind, on a log scale."""
    largest = max((values[0] for values in spectra.values() if values), default=0.0) or 1.0
    top = math.ceil(math.log10(largest))
    smallest = min(
        (one for values in spectra.values() for one in values if one > 0), default=largest
    )
    bottom = max(math.floor(math.log10(smallest)), top - _DECADES)
    bottom = min(bottom, top - 1)
    longest = max((len(values) for values in spectra.values()), default=1)
    kinds = list(dict.fromkeys(layer_and_kind(module)[1] for module in spectra))
    colors = {kind: _LINES[place % len(_LINES)] for place, kind in enumerate(kinds)}
    parts = [_text(_LEFT, 16, title), *_axes(bottom, top, longest)]
    for module, values in spectra.items():
        points = [
            f"{_across(place, longest):.1f},{_up(math.log10(one), bottom, top):.1f}"
            for place, one in enumerate(values)
            if one > 0 and math.log10(one) >= bottom
        ]
        parts.append(
            f"<polyline points='{' '.join(points)}' fill='none' stroke-opacity='0.6' "
            f"stroke='{colors[layer_and_kind(module)[1]]}'><title>{escape(module)}</title>"
            "</polyline>"
        )
    parts += _legend(colors)
    return _picture(_LEFT + _WIDTH + 130, _TOP + _HEIGHT + 40, parts)


def _axes(bottom: int, top: int, longest: int) -> Iterable[str]:
    for power in range(bottom, top + 1):
        place = _up(power, bottom, top)
        yield f"<path d='M{_LEFT} {place:.1f}h{_WIDTH}' stroke='#ddd'/>"
        yield _text(_LEFT - 6, place + 4, f"1e{power}", "end")
    for place in range(0, longest, max(1, longest // _TICKS)):
        yield _text(_across(place, longest), _TOP + _HEIGHT + 16, str(place + 1), "middle")
    yield _text(_LEFT + _WIDTH / 2, _TOP + _HEIGHT + 32, "singular value", "middle")


def _across(place: int, longest: int) -> float:
    return _LEFT + _WIDTH * place / max(1, longest - 1)


def _up(power: float, bottom: int, top: int) -> float:
    return _TOP + _HEIGHT * (top - power) / (top - bottom)


def _legend(colors: Mapping[str, str]) -> Iterable[str]:
    for place, (kind, color) in enumerate(colors.items()):
        top = _TOP + 16 * place
        yield f"<path d='M{_LEFT + _WIDTH + 12} {top + 6}h16' stroke='{color}' stroke-width='3'/>"
        yield _text(_LEFT + _WIDTH + 34, top + 10, kind)


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f"<text x='{x:g}' y='{y:g}' text-anchor='{anchor}' {_FONT}>{escape(text)}</text>"


def _picture(width: float, height: float, parts: Iterable[str]) -> str:
    head = (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width:g} {height:g}' "
        f"width='{width:g}' height='{height:g}'>"
    )
    return "\n".join([head, "<rect width='100%' height='100%' fill='#fff'/>", *parts, "</svg>\n"])
