"""The parts of a self-contained HTML page: every text that is not markup of ours is escaped where it enters.

The page holds no script and asks for nothing from outside, and its Content-Security-Policy forbids browsers both: what
a record holds cannot run, even if it should get past the escaping. Colours follow the system, light or dark.
"""

import html
import re
from collections.abc import Iterable, Mapping, Sequence

STYLE = """
:root { color-scheme: light dark; --paper: #f7f6f2; --card: #ffffff; --ink: #1b1c1e; --soft: #595b60; --rule: #dedbd2;
  --c0: #1b5fa7; --c1: #b3490b; --c2: #74767b; --track: #eceae3; --good: #17703c; --bad: #a8281e; }
@media (prefers-color-scheme: dark) { :root { --paper: #141518; --card: #1c1e22; --ink: #e9e8e4; --soft: #a4a6ac;
  --rule: #34373d; --c0: #79b4f7; --c1: #f5a366; --c2: #9a9ca3; --track: #2a2d32; --good: #70c994; --bad: #ff958a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); overflow-wrap: anywhere;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif; }
main { max-width: 1136px; margin: 0 auto; padding: 28px 16px 64px; }
h1 { font-size: 30px; line-height: 1.15; letter-spacing: -0.015em; margin: 2px 0 8px; }
h2 { font-size: 19px; letter-spacing: -0.005em; margin: 44px 0 4px; }
h3 { font-size: 14px; margin: 0 0 6px; }
p { margin: 0 0 12px; max-width: 74ch; } .soft, figcaption, th, dt, footer { color: var(--soft); }
.kicker { font-size: 12px; font-weight: 600; letter-spacing: 0.08em; text-transform: uppercase; color: var(--soft); }
.grid { display: grid; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 14px 16px; margin: 0;
  min-width: 0; }
.tiles { display: grid; gap: 10px; grid-template-columns: repeat(auto-fit, minmax(148px, 1fr)); margin: 20px 0 0; }
.tile { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 10px 14px 12px; }
.tile b { display: block; font-size: 23px; line-height: 1.25; font-variant-numeric: tabular-nums; }
.tile span { display: block; font-size: 12.5px; line-height: 1.35; color: var(--soft); }
figcaption { font-size: 13px; line-height: 1.4; margin-top: 8px; }
svg { display: block; width: 100%; height: auto; font-size: 11px; fill: var(--soft); }
svg text { font-variant-numeric: tabular-nums; } .rule { stroke: var(--rule); stroke-width: 1; }
.line { fill: none; stroke: var(--c0); stroke-width: 2; stroke-linejoin: round; }
.faint { opacity: 0.4; stroke-width: 1; }
.band { fill: var(--c0); opacity: 0.18; } .dot { fill: var(--c0); }
svg line.mark { stroke: var(--c1); stroke-width: 1.5; stroke-dasharray: 5 4; }
.marked { fill: var(--c1); paint-order: stroke; stroke: var(--card); stroke-width: 4px; }
.hover { fill: transparent; } .hover:hover { fill: var(--ink); fill-opacity: 0.1; }
.heap { stroke-width: 1.6; fill-opacity: 0.28; stroke-linejoin: round; }
.heap0 { fill: var(--c0); stroke: var(--c0); } .heap1 { fill: var(--c1); stroke: var(--c1); stroke-dasharray: 4 2; }
.heap2 { fill: var(--c2); stroke: var(--c2); stroke-dasharray: 1.5 2; }
.key { font-size: 13px; margin: 8px 0 0; padding: 0; list-style: none; font-variant-numeric: tabular-nums; }
.key li { display: flex; gap: 7px; } .key i { flex: none; width: 11px; height: 11px; border-radius: 2px;
  margin-top: 4px; }
.key0 i, .bar0 { background: var(--c0); } .key1 i, .bar1 { background: var(--c1); }
.key2 i, .bar2 { background: var(--c2); }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: 14px; }
th { font-weight: 500; font-size: 12.5px; text-align: left; }
dd code { white-space: pre-line; } .note { font-size: 13px; margin: 8px 0 0; }
th, td { padding: 6px 14px 6px 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
tr:last-child td { border-bottom: 0; } th:last-child, td:last-child { padding-right: 0; }
.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
.words { overflow-wrap: break-word; } .bars { width: 34%; min-width: 72px; vertical-align: middle; }
.track { background: var(--track); border-radius: 2px; height: 8px; margin: 3px 0; overflow: hidden; }
.track div { height: 100%; } dl { margin: 0; } dt { font-size: 12.5px; } dd { margin: 0 0 8px; }
dd:last-child { margin-bottom: 0; }
code, pre { font: 12.5px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre { white-space: pre-wrap; margin: 10px 0 0; } .good { color: var(--good); } .bad { color: var(--bad); }
details { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 10px 16px;
  margin: 8px 0; }
summary { cursor: pointer; } .miss { margin: 0 0 14px; } .texts { display: grid; gap: 6px 24px; }
.texts p { margin: 0; white-space: pre-line; }
blockquote { margin: 0 0 12px; font-weight: 600; white-space: pre-line; }
footer { font-size: 13px; margin-top: 40px; border-top: 1px solid var(--rule); padding-top: 12px; }
@media (min-width: 760px) { .texts { grid-template-columns: 1fr 1fr; } }
@media (max-width: 520px) { .bars { min-width: 48px; width: 24%; }
  th, td { padding-right: 9px; } h1 { font-size: 25px; } }
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


class Markup(str):
    """HTML that is ours, or that has been escaped."""

    __slots__ = ()


def escaped(text: str) -> Markup:
    """Return text as HTML that shows it; Markup stays as it is."""
    return text if isinstance(text, Markup) else Markup(html.escape(text))


def breakable(path: str) -> Markup:
    """Return a path, or a setting's, that a narrow column may break behind / _ and . only."""
    return Markup(re.sub(r"([/_.])", r"\1<wbr>", escaped(path)))


def joined(parts: Iterable[str]) -> Markup:
    """Join texts and markup."""
    return Markup("".join(escaped(part) for part in parts))


def tag(name: str, *parts: str, css: str = "") -> Markup:
    """Enclose parts in an element.  css: its class."""
    opening = f'{name} class="{css}"' if css else name
    return Markup(f"<{opening}>{joined(parts)}</{name}>")


def section(title: str, lead: str, *parts: str) -> Markup:
    """Make a part of the page.  lead: a sentence below the title that says what is here."""
    return tag("section", tag("h2", title), tag("p", lead, css="soft"), *parts)


def figure(title: str, chart: Markup, caption: str) -> Markup:
    """Show a chart with its title, and a caption that says what to look for."""
    return tag("figure", tag("h3", title), chart, tag("figcaption", caption), css="card")


def facts(pairs: Mapping[str, str]) -> Markup:
    """List facts by their names."""
    return tag("dl", *(joined((tag("dt", name), tag("dd", value))) for name, value in pairs.items()), css="card")


def table(head: Sequence[str], rows: Sequence[Sequence[str]], classes: Sequence[str], title: str, note: str) -> Markup:
    """Make a table.  classes: of each column; "n" sets numbers.  title, note: above and below it, "" for none."""
    cells = [tag("th", name, css=css) for name, css in zip(head, classes, strict=True)]
    body = [tag("tr", *(tag("td", cell, css=css) for cell, css in zip(row, classes, strict=True))) for row in rows]
    whole = tag("table", tag("thead", tag("tr", *cells)), tag("tbody", *body))
    above, below = [tag("h3", title)] if title else [], [tag("p", note, css="note soft")] if note else []
    return tag("div", *above, whole, *below, css="card wide")


def bars(shares: Sequence[tuple[float, int]]) -> Markup:
    """Draw bars one above the other.  shares: of the whole width (cut to 0..1), and which of the page's colours."""
    drawn = (
        f'<div class="track"><div class="bar{color}" style="width:{100 * min(1.0, max(0.0, share)):.1f}%"></div></div>'
        for share, color in shares
    )
    return Markup("".join(drawn))


def key(names: Sequence[str]) -> Markup:
    """Say what the colours of a chart mean, in their order; "" passes over a colour."""
    lines = [
        joined([Markup(f'<li class="key{place}"><i></i>'), tag("span", name), Markup("</li>")])
        for place, name in enumerate(names)
        if name
    ]
    return tag("ul", *lines, css="key")


def folded(summary: str, text: str) -> Markup:
    """Keep a long text behind its title."""
    return tag("details", tag("summary", summary), tag("pre", text))


def page(title: str, *parts: str) -> Markup:
    """Make the whole document."""
    return Markup(
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escaped(POLICY)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escaped(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{joined(parts)}\n</main>\n</body>\n</html>\n"
    )
