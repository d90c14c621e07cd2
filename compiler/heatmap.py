"""Heat maps of expert use as SVG: a row a layer, a column an expert, one picture for all text and one for each domain."""

from __future__ import annotations

import html
from collections.abc import Sequence

from moec.compiler.calibration.locality import Use

_CELL, _LEFT, _TOP = 14, 56, 18
_FULL = 4.0
"""Times the even share at which a cell has the darkest colour."""

_NONE, _EVEN, _MOST = (255, 255, 255), (158, 202, 225), (8, 48, 107)

STYLE = """
.heat rect { stroke: #fff; stroke-width: .5 } .heat { margin: 0 1.5em 1em 0 } figure { display: inline-block; margin: 0 }
figcaption { font-size: 13px; margin: .3em 0 } .scale { font-size: 12px; color: #444 } .scale svg { vertical-align: middle }
"""


def colour(times: float) -> str:
    """The colour of a share, given as times the even share: white for none, light blue for the even share, dark from four times it.

    >>> colour(0), colour(1), colour(9)
    ('#ffffff', '#9ecae1', '#08306b')
    """
    low, high, at = (_NONE, _EVEN, times) if times <= 1 else (_EVEN, _MOST, min(1.0, (times - 1) / (_FULL - 1)))
    return "#" + "".join(f"{round(a + (b - a) * at):02x}" for a, b in zip(low, high, strict=True))


def heat_map(rows: Sequence[Sequence[float]], labels: Sequence[str], caption: str) -> str:
    """A figure of shares, each row of which sums to one.

    Args:
        rows: by layer, the share of each expert.
        labels: of the rows.
        caption: what stands above.
    """
    columns = max(map(len, rows))
    cell = max(4, min(_CELL, 900 // columns))
    step = next(s for s in (1, 2, 4, 8, 16, 32, 64, 128) if s * cell >= 22)
    parts = [f'<text x="{_LEFT + (c + 0.5) * cell:.1f}" y="12" text-anchor="middle" class="t">{c}</text>' for c in range(0, columns, step)]
    for y, (row, label) in enumerate(zip(rows, labels, strict=True)):
        top = _TOP + y * _CELL
        parts.append(f'<text x="{_LEFT - 6}" y="{top + 10}" text-anchor="end" class="t">{html.escape(label)}</text>')
        for x, share in enumerate(row):
            parts.append(
                f'<rect x="{_LEFT + x * cell}" y="{top}" width="{cell}" height="{_CELL}" fill="{colour(share * len(row))}">'
                f"<title>{html.escape(label)}, expert {x}: {share:.2%}, {share * len(row):.2f} times the even share</title></rect>"
            )
    width, height = _LEFT + columns * cell + 4, _TOP + len(rows) * _CELL + 4
    return (
        f"<figure><figcaption>{html.escape(caption)}</figcaption>"
        f'<svg class="heat" viewBox="0 0 {width} {height}" width="{width}" height="{height}">{"".join(parts)}</svg></figure>'
    )


def _scale() -> str:
    steps = (0, 0.25, 0.5, 1, 1.5, 2, 3, 4)
    cells = "".join(f'<rect x="{i * 30}" width="30" height="14" fill="{colour(v)}"/>' for i, v in enumerate(steps))
    texts = "".join(f'<text x="{i * 30 + 15}" y="26" text-anchor="middle" class="t">{v:g}x</text>' for i, v in enumerate(steps))
    return f'<p class="scale">share of choices, in times the even share <svg class="heat" width="240" height="30">{cells}{texts}</svg></p>'


def use_section(uses: Sequence[Use], domains: Sequence[str]) -> str:
    """The part of the page that shows how experts are used."""
    labels = [f"layer {i}" for i in range(len(uses))]
    figures = [heat_map([u.share for u in uses], labels, "all text")]
    if len(domains) > 1:
        figures += [heat_map([u.domain_share[d] for u in uses], labels, name) for d, name in enumerate(domains)]
    local = any(u.locality for u in uses)
    head = ["layer", "experts", "used", "load entropy", "variation", "between domains", "most used", "least used"]
    head += ["SRP", "SCH by cache size in K"] if local else []
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>" for cells in use_table(uses))
    return (
        f"<h2>Use of experts</h2>{_scale()}{''.join(figures)}<table><tr>{''.join(f'<th>{name}</th>' for name in head)}</tr>{rows}</table>"
    )


def use_table(uses: Sequence[Use]) -> list[list[str]]:
    """Cells of a table, a row a layer."""
    rows = []
    for index, use in enumerate(uses):
        (most, top), (least, low) = use.most, use.least
        cells = [str(index), str(len(use.share)), str(use.used), f"{use.entropy:.4f}", f"{use.variation:.3f}", f"{use.domain_distance:.3f}"]
        cells += [f"{most} ({top:.2%})", f"{least} ({low:.2%})"]
        if use.locality is not None:
            cells += [f"{use.locality.srp:.3f}", ", ".join(f"{rho}: {rate:.3f}" for rho, rate in use.locality.sch.items())]
        rows.append(cells)
    return rows
