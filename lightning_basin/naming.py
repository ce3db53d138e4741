"""A user's names, of layers and prefixes, in a form that can be printed, logged and written to tables."""

import re
from functools import cache
from urllib.parse import quote

_MARKUP = re.compile(r"""[\[\]<>&"'`*|\\%]""")
"""The characters that rich, Markdown and HTML read as markup, and the sign of an escape itself."""

_FORMULA = "=+-@"
"""The characters that make a spreadsheet compute where a cell begins with them."""


@cache
def escaped(name: str) -> str:
    """Percent-encode a name's control characters, line ends and markup, as in a URL.

    Two names that differ stay different. A name of letters, digits, spaces and ``._-/`` stays as it is.

    Example:
        >>> escaped("encoder.0"), escaped("[bold]")
        ('encoder.0', '%5Bbold%5D')
    """
    characters = [
        character
        if character.isprintable() and _MARKUP.match(character) is None
        else quote(character, safe="", errors="surrogatepass")
        for character in name
    ]
    if name.startswith(tuple(_FORMULA)):
        characters[0] = f"%{ord(name[0]):02X}"  # `quote` leaves a minus as it is.
    return "".join(characters)


def counted(number: int, noun: str) -> str:
    """Write a number with its noun, in the plural with an s unless the number is 1."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def printable(text: str) -> str:
    """Percent-encode a text's control characters, except for line ends."""
    characters = (
        character if character.isprintable() or character == "\n" else quote(character, errors="surrogatepass")
        for character in text
    )
    return "".join(characters)
