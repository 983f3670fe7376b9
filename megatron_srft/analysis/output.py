"""What an analysis leaves behind: one self-contained page, and its figures as JSON beside it."""

import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from megatron_srft.analysis.page import element, navigation, page, section
from megatron_srft.analysis.report import muted


def write(path: Path, title: str, about: str, parts: Mapping[str, str], tree: Mapping[str, Any]) -> list[Path]:
    """Write `path` (the page) and the same name with .json; returns both.

    Args:
        about: one sentence under the title.
        parts: title of a section -> its HTML.
        tree: the figures, finite numbers only.
    """
    head = element("p", "megatron_srft analysis", class_="overline") + element("h1", escape(title)) + muted(about)
    body = head + navigation(parts) + "".join(section(name, content) for name, content in parts.items())
    figures = path.with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(title, body), encoding="utf-8", errors="xmlcharrefreplace")
    figures.write_text(json.dumps(tree, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return [path, figures]
