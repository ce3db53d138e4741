"""Names of the user's, of layers and prefixes, as they can be printed, tabulated, logged and written."""

import re
from urllib.parse import quote

_MARKUP = re.compile(r"""[\[\]<>&"'`*|\\%]""")
"""What rich, Markdown and HTML read as more than a character; and the sign of an escape itself."""

_FORMULA = "=+-@"
"""At the beginning of a cell, these make a spreadsheet compute."""


def escaped(name: str) -> str:
    """A name whose control characters, line ends and markup are percent-encoded, as in a URL.

    Two names that differ stay different, and one of letters, digits, spaces and ``._-/`` stays as it is.

    Args:
        name: Any string.

    Example:
        >>> escaped("encoder.0"), escaped("[bold]")
        ('encoder.0', '%5Bbold%5D')
    """
    characters = [
        quote(character, safe="", errors="surrogatepass") if _is_special(character) else character for character in name
    ]
    if name.startswith(tuple(_FORMULA)):
        characters[0] = f"%{ord(name[0]):02X}"  # `quote` leaves a minus as it is.
    return "".join(characters)


def _is_special(character: str) -> bool:
    return not character.isprintable() or _MARKUP.match(character) is not None


def printable(text: str) -> str:
    r"""A text, which may have several lines, whose other control characters are percent-encoded.

    Example:
        >>> printable("red: \x1b[31m")
        'red: %1B[31m'
    """
    characters = (
        character if character.isprintable() or character == "\n" else quote(character, errors="surrogatepass")
        for character in text
    )
    return "".join(characters)
