"""The page of probability changes: shares, histogram, the most changed tokens, and texts with coloured tokens."""

from collections.abc import Callable, Sequence
from html import escape

from megatron_srft.analysis import probabilities
from megatron_srft.analysis.charts import histogram
from megatron_srft.analysis.page import element, facts, table
from megatron_srft.analysis.probabilities import Change, TokenChange, shares
from megatron_srft.analysis.report import muted

MOST = 20
"""Rows of each table of most changed tokens."""

FULL_COLOUR = 0.6
"""Share of the colour that a change of 1 has; smaller changes have it in proportion, from FAINTEST on."""
FAINTEST = 0.12


def sections(
    found: Change,
    texts: Sequence[dict[str, str]],
    word: Callable[[int], str],
    *,
    lower: float,
    higher: float,
    show: int,
    min_count: int,
) -> dict[str, str]:
    """Parts of the page.

    Args:
        texts: `prompt` and `response` of each text.
        word: a token's text.
        show: texts shown.
        min_count: occurrences that a token needs to stand in the table of most changed ones.
    """
    edges, counts = probabilities.histogram(found.all)
    plot = histogram(edges, counts, [lower, higher], "change of probability")
    return {
        "Shares": _shares(found, lower, higher),
        "Histogram": element("div", element("figure", plot), class_="plots"),
        "Most changed tokens": _most_changed(found, word, lower, higher, min_count),
        "Texts": _texts(found, texts, word, lower, higher, show),
    }


def _shares(found: Change, lower: float, higher: float) -> str:
    """The asked thresholds, and symmetric ones beside them."""
    rows = []
    for low, high in dict.fromkeys([(lower, higher), *((-t, t) for t in probabilities.THRESHOLDS)]):
        part = shares(found.all, low, high)
        figures = (part.changed, part.lower, part.similar, part.higher)
        rows.append([f"{low:+g} and {high:+g}", *(f"{figure:.2%}" for figure in figures)])
    size = {
        "Texts": str(len(found.tokens)),
        "Tokens": str(len(found.all)),
        "Mean change": f"{found.all.mean():+.4f}",
        "Mean absolute change": f"{abs(found.all).mean():.4f}",
    }
    return facts(size) + table(["thresholds", "changed", "lower", "similar", "higher"], rows)


def _most_changed(found: Change, word: Callable[[int], str], lower: float, higher: float, min_count: int) -> str:
    rows = [r for r in probabilities.token_changes(found, lower, higher) if r.count >= min_count]
    if not rows:
        return muted(f"No token occurs {min_count} times; lower --min-count.")
    raised = [row for row in reversed(rows) if row.mean > 0][:MOST]
    lowered = [row for row in rows if row.mean < 0][:MOST]
    heading = ["token", "occurrences", "mean change", "lower", "higher"]
    parts = [muted(f"Tokens that occur at least {min_count} times, by their mean change.")]
    for title, some in (("Raised", raised), ("Lowered", lowered)):
        cells = [_row(row, word) for row in some]
        parts += [element("h3", title), table(heading, cells) if cells else muted("None.")]
    return "".join(parts)


def _row(row: TokenChange, word: Callable[[int], str]) -> list[str]:
    return [visible(word(row.token)), str(row.count), f"{row.mean:+.4f}", f"{row.lower:.1%}", f"{row.higher:.1%}"]


def visible(text: str) -> str:
    """A token's text in a table, quoted so that white space is seen."""
    return repr(text)


def _texts(
    found: Change, texts: Sequence[dict[str, str]], word: Callable[[int], str], lower: float, higher: float, show: int
) -> str:
    legend = (
        element("span", "lower", class_="token", style=_colour(-0.5))
        + " "
        + element("span", "higher", class_="token", style=_colour(0.5))
    )
    parts = [element("p", legend, " ", "the stronger, the larger the change; point at a token for its probabilities")]
    rows = zip(texts, found.tokens, found.before, found.after, strict=True)
    for text, tokens, before, after in list(rows)[:show]:
        spans = (
            _token(word(token), b, a, lower, higher)
            for token, b, a in zip(tokens.tolist(), before.tolist(), after.tolist(), strict=True)
        )
        part = shares(after - before, lower, higher)
        header = f"{len(tokens)} tokens, {part.lower:.1%} lower, {part.higher:.1%} higher"
        exchange = element("span", "prompt") + element("pre", escape(text["prompt"]))
        exchange += element("span", "response") + element("pre", *spans)
        card = element("header", element("span", header)) + element("div", exchange, class_="exchange")
        parts.append(element("article", card, class_="sample"))
    if len(texts) > show:
        parts.append(muted(f"{len(texts) - show} more texts are in the JSON file; --show N shows more here."))
    return "".join(parts)


def _token(text: str, before: float, after: float, lower: float, higher: float) -> str:
    change = after - before
    shaded = change < lower or change > higher
    # A token without anything to see, as the end of the sequence may be, still has to have a place for its colour.
    shown = escape(text) if text.strip() else escape(text) + "\N{OPEN BOX}"
    return element(
        "span",
        shown,
        class_="token",
        title=f"{before:.4f} \N{RIGHTWARDS ARROW} {after:.4f} ({change:+.4f})",
        **({"style": _colour(change)} if shaded else {}),
    )


def _colour(change: float) -> str:
    name = "--good" if change > 0 else "--bad"
    strength = FAINTEST + (FULL_COLOUR - FAINTEST) * min(abs(change), 1.0)
    return f"background:color-mix(in srgb, var({name}) {100 * strength:.0f}%, transparent)"
