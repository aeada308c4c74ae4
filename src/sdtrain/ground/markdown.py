"""Text from outside, made safe for where it stands in a Markdown file (CommonMark 0.31, with GitHub's tables).

Such text stands in code only, spans or blocks: nothing else keeps it verbatim in every renderer, since many turn bare
text such as `www.…`, `@name`, `#1` or `:smile:` into something else even where its punctuation is escaped. It never
stands in a table, whose cells end at `|` even inside code.
"""

import re
import unicodedata

_REORDERING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Controls that let a text be displayed in another order than it has, what follows it included."""
_UNKNOWN = "\N{REPLACEMENT CHARACTER}"


def one_line(text: str) -> str:
    """The text without line breaks: each run of them, or of control characters, becomes a space.

    What can't be encoded, or reorders the text around it, becomes U+FFFD. Everything else stays as it is.
    """
    kept = []
    for char in text:
        category = unicodedata.category(char)
        if category in ("Cc", "Zl", "Zp"):
            kept.append("\n")
        elif category == "Cs" or char in _REORDERING:
            kept.append(_UNKNOWN)
        else:
            kept.append(char)
    return re.sub(r"\n+", " ", "".join(kept))


def code_span(text: str) -> str:
    """The text, on one line, as inline code that nothing in it can end."""
    text = one_line(text)
    if not text:
        return "(empty)"  # there is no empty code span
    ticks = "`" * (_longest_run(text) + 1)
    # CommonMark removes one space from both ends, unless there is nothing else.
    pad = " " if text.strip(" ") and (text[0] in "` " or text[-1] in "` ") else ""
    return f"{ticks}{pad}{text}{pad}{ticks}"


def code_block(language: str, code: str) -> str:
    """A fenced block that no line of the code can end."""
    fence = "`" * max(3, _longest_run(code) + 1)
    return f"{fence}{language}\n{code}\n{fence}"


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
