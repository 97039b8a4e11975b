"""Texts of models as HTML that cannot do anything: Markdown without HTML, images or scripts.

Control characters and characters that change the direction of the text are shown, so that a person
sees what a model really wrote. Left out: formulas, highlighted code.
"""

from __future__ import annotations

import re
from functools import cache
from html import escape
from typing import Any

LONGEST = 50_000  # characters that are read as Markdown; longer texts are shown as they are
SCHEMES = ("http://", "https://", "mailto:")
# line feed and tab are white space; others are control characters, and marks that reorder or hide
# text: zero width, left-to-right and right-to-left overrides, isolates, byte order mark, tags
HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u2028-\u202e\u2060-\u2069\ufeff\U000e0000-\U000e007f]"
)


def to_html(text: str) -> str:
    """Render a text as Markdown."""
    text = visible(text)
    if len(text) > LONGEST:
        return f"<pre>{escape(text)}</pre>"
    return visible(str(_markdown().render(text)))  # again: of an entity such as &#x202e;


def both(text: str) -> dict[str, str]:
    """A text as pages get it: rendered, as it is, and with all characters visible."""
    return {"html": to_html(text), "text": text, "plain": visible(text)}


def visible(text: str) -> str:
    """Replace characters that cannot be seen by their code, such as [U+202E]."""
    lines = text.replace("\r\n", "\n")
    return HIDDEN.sub(lambda match: f"[U+{ord(match[0]):04X}]", lines)


@cache
def _markdown() -> Any:
    from markdown_it import MarkdownIt

    class Markdown(MarkdownIt):
        def validateLink(self, url: str) -> bool:
            return url.strip().lower().startswith(SCHEMES)

    markdown = Markdown("commonmark", {"html": False, "breaks": True, "typographer": False})
    markdown.enable(["table", "strikethrough"]).disable(["image", "html_block", "html_inline"])
    markdown.add_render_rule("link_open", _link)
    return markdown


def _link(self: Any, tokens: Any, index: int, options: Any, environment: Any) -> str:
    for name, value in (("target", "_blank"), ("rel", "noopener noreferrer nofollow")):
        tokens[index].attrSet(name, value)
    return str(self.renderToken(tokens, index, options, environment))
