"""The HTML of the report: small builders that escape every text they are given, and the style sheet."""

from collections.abc import Iterable
from html import escape

STYLE = """
:root { color-scheme: light dark;
  --paper: #fbfbfa; --card: #ffffff; --ink: #1c1e21; --muted: #63676e; --line: #e3e4e6; --soft: #f3f4f5;
  --accent: #1f5fbf; --good: #11734b; --good-soft: #e2f3ea; --bad: #a8322a; --bad-soft: #fbe9e7;
  --c0: #2266cc; --c1: #d9660b; --c2: #15855a; --c3: #b0308c; --c4: #6b4fd0; --c5: #8d7500; --c6: #0d8aa0;
  --c7: #7b818a; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #15171a; --card: #1c1f23; --ink: #e8e9eb; --muted: #a0a5ad; --line: #33373d; --soft: #24282d;
  --accent: #7fb0ff; --good: #6fd3a2; --good-soft: #17382a; --bad: #ff9a8f; --bad-soft: #43211e;
  --c0: #6ea8ff; --c1: #ff9d4d; --c2: #4fcf97; --c3: #ef7fcd; --c4: #a996ff; --c5: #d6bf45; --c6: #4fc9de;
  --c7: #a3a9b2; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0; letter-spacing: -.015em; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.75rem 0 .75rem; padding-top: .9rem; border-top: 1px solid var(--line); }
h3 { font-size: .95rem; margin: 0; font-weight: 600; }
p { margin: .25rem 0; }
.muted { color: var(--muted); } .small { font-size: .85rem; }
.overline { color: var(--muted); font-size: .8rem; letter-spacing: .06em; text-transform: uppercase;
  margin: 0 0 .3rem; }
.cards, .plots { display: grid; gap: 1rem; }
.cards { grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr)); margin: 1.5rem 0; }
.plots { grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); }
.card, figure, .sample { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.card { padding: .9rem 1.1rem; } .card .value { font-size: 1.55rem; font-weight: 600; letter-spacing: -.01em;
  font-variant-numeric: tabular-nums; }
.card .label { color: var(--muted); font-size: .85rem; overflow-wrap: anywhere; }
.up { color: var(--good); } .down { color: var(--bad); }
figure { margin: 0; padding: .9rem 1rem .7rem; display: flex; flex-direction: column; }
figure svg { width: 100%; height: auto; display: block; margin: .25rem 0; }
figure svg text { font-family: inherit; }
figcaption { color: var(--muted); font-size: .82rem; margin-top: auto; }
.legend { display: flex; flex-wrap: wrap; gap: .1rem .9rem; font-size: .8rem; color: var(--muted); margin-top: .15rem; }
.legend span { display: inline-flex; align-items: center; gap: .35rem; overflow-wrap: anywhere; }
.legend i { width: .8rem; height: .22rem; border-radius: 2px; flex: none; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; color: var(--muted); font-weight: 500; }
td, th { padding: .4rem .9rem .4rem 0; vertical-align: top; border-bottom: 1px solid var(--line); }
tr:last-child td { border-bottom: 0; }
.number { text-align: right; } td.number { white-space: nowrap; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 0 2.5rem;
  margin: 0; }
.facts div { display: flex; gap: 1rem; border-bottom: 1px solid var(--line); padding: .38rem 0; font-size: .9rem; }
.facts dt { color: var(--muted); flex: 0 0 8.5rem; } .facts dd { margin: 0; overflow-wrap: anywhere; }
.sample { padding: .9rem 1.1rem; margin: .8rem 0; } .sample header { display: flex; flex-wrap: wrap; gap: .4rem .6rem;
  align-items: center; font-size: .83rem; color: var(--muted); margin-bottom: .5rem; }
.badge { border-radius: 99px; padding: .05rem .6rem; font-weight: 600; background: var(--soft); color: var(--muted); }
.badge.good { background: var(--good-soft); color: var(--good); }
.badge.bad { background: var(--bad-soft); color: var(--bad); }
.exchange { display: grid; grid-template-columns: 7.5rem 1fr; gap: .5rem 1rem; font-size: .85rem; }
.exchange > span { color: var(--muted); padding-top: .3rem; }
pre { margin: 0; padding: .35rem .6rem; background: var(--soft); border-radius: 6px; white-space: pre-wrap;
  overflow-wrap: anywhere; font: .82rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.exchange pre { max-height: 20rem; overflow-y: auto; } .exchange details { margin: .3rem 0; min-width: 0; }
details { margin: .5rem 0; } summary { cursor: pointer; color: var(--accent); } details pre { margin-top: .5rem; }
.token { border-radius: 3px; } .facts + .scroll, .scroll + h3 { margin-top: 1.2rem; }
a { color: var(--accent); }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; font-size: .88rem; margin: 1rem 0 0; }
nav a { text-decoration: none; } nav a:hover { text-decoration: underline; }
@media (max-width: 640px) { main { padding-top: 1.5rem; } .exchange { grid-template-columns: 1fr; gap: .2rem; }
  .facts dt { flex-basis: 7rem; } }
@media print { main { max-width: none; } figure, .sample, .card { break-inside: avoid; }
  .exchange pre { max-height: none; } }
"""


def element(tag: str, *content: str, **attributes: str) -> str:
    """A tag around HTML that is already escaped; attribute values are escaped here (`class_` is `class`)."""
    written = "".join(f' {name.rstrip("_")}="{escape(value)}"' for name, value in attributes.items())
    return f"<{tag}{written}>{''.join(content)}</{tag}>"


def table(heading: list[str], rows: Iterable[list[str]], *, text_columns: int = 1) -> str:
    """A table of plain texts, escaped here; columns after the first `text_columns` are numbers."""

    def row(tag: str, cells: list[str]) -> str:
        styled = ("number" if column >= text_columns else "" for column in range(len(cells)))
        return element("tr", *(element(tag, escape(c), class_=style) for c, style in zip(cells, styled, strict=True)))

    body = element("tbody", *(row("td", cells) for cells in rows))
    return element("div", element("table", element("thead", row("th", heading)), body), class_="scroll")


def facts(pairs: dict[str, str]) -> str:
    """A definition list of plain texts, escaped here."""
    items = (element("div", element("dt", escape(k)), element("dd", escape(v))) for k, v in pairs.items())
    return element("dl", *items, class_="facts")


def section(title: str, *content: str) -> str:
    """A titled part of the page that `navigation` can point to."""
    return element("section", element("h2", escape(title), id=anchor(title)), *content)


def navigation(titles: Iterable[str]) -> str:
    return element("nav", *(element("a", escape(title), href=f"#{anchor(title)}") for title in titles))


def anchor(title: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in title.lower())


def page(title: str, body: str) -> str:
    """The whole document; nothing in it is loaded from elsewhere."""
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style>"
    )
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body><main>{body}</main></body></html>\n'
