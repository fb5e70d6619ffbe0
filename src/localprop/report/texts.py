"""Names that come from elsewhere, made harmless: in one short line, in Markdown, and in pictures."""

import re

from localprop.errors import shortened

_ESCAPED = re.compile(r"[\\`*~|$]|(?<![0-9A-Za-z])_|_(?![0-9A-Za-z])|\](?=[(\[:])|!(?=\[)|^[#+=-]")
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def markdown(text: object, most: int = 200) -> str:
    """A text that Markdown shows as it is: no markup, HTML, formulas, links or columns. Shortened to `most`."""
    line = _ESCAPED.sub(lambda match: "\\" + match[0], shortened(text, most))
    for character, entity in _ENTITIES.items():
        line = line.replace(character, entity)
    return line.replace("://", "&#58;//").replace("www.", "www&#46;")


def code(text: object, most: int = 2000) -> str:
    """A text as code in a line of Markdown, whatever backticks it holds. Shortened to `most`."""
    line = shortened(text, most)
    longest = max((len(run) for run in re.findall("`+", line)), default=0)
    fence, space = "`" * (longest + 1), " " if line[:1] == "`" or line[-1:] == "`" else ""
    return f"{fence}{space}{line}{space}{fence}"


def drawn(text: object, most: int = 120) -> str:
    """A text for matplotlib, which takes what stands between dollars for a formula. Shortened to `most`."""
    return shortened(text, most).replace("$", r"\$")
