"""How often a text turns back on itself: counts of the words that "Demystifying Long CoT" looks at.

Source: arXiv 2502.03373, whose rate counts wait, recheck, alternatively, retry and however; it does not say whether per
response or per token, so both are made from these counts. Whole words only, in any case: "await" is none.
"""

import re
from collections import Counter
from collections.abc import Iterable

KEYWORDS = ("wait", "recheck", "retry", "alternatively", "however")

# One pattern per word that starts with its letters: the engine then looks for those, six times faster than for \b. The
# look-behind, after them, is the word boundary before them.
_PATTERNS = {word: re.compile(rf"{word}(?<!\w{word})\b") for word in KEYWORDS}


def count_keywords(text: str) -> Counter[str]:
    """How often each of KEYWORDS stands in the text."""
    lowered = text.lower()
    return Counter({word: len(pattern.findall(lowered)) for word, pattern in _PATTERNS.items()})


def keyword_rates(texts: Iterable[str], tokens: int) -> dict[str, float]:
    """Rates over all responses of a step; empty without a response.

    Args:
        tokens: of all these responses together.

    Returns:
        reflection/<keyword>: occurrences per response; reflection/per_1k_tokens: of all keywords, per 1000 tokens.
    """
    counts = [count_keywords(text) for text in texts]
    if not counts:
        return {}
    total = sum(counts, Counter())
    rates = {f"reflection/{word}": total[word] / len(counts) for word in KEYWORDS}
    return rates | {"reflection/per_1k_tokens": 1000 * total.total() / max(tokens, 1)}
