"""What the site changes in pages and docstrings: links to files of the repository, and signs of other generators."""

import re
from typing import Any

import griffe


def on_page_markdown(markdown: str, *, page: Any, **_: object) -> str:
    """Make text of links that lead out of ``docs``, where the site has no page, and leave out names of files.

    Args:
        markdown: The text of the page.
        page: The page, whose place says how many folders a link must leave.
    """
    depth = page.file.src_uri.count("/") + 1
    markdown = re.sub(r"\[(\w+)\.md\]", lambda link: f"[{link[1].replace('_', ' ')}]", markdown)
    return re.sub(rf"(?<!!)\[([^\]]*)\]\((?:\.\./){{{depth}}}[^)]*\)", r"\1", markdown)


class Docstrings(griffe.Extension):
    """Reads ``Example:`` as the beginning of code, and formulas as code, too."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        """Change the docstring of an object.

        Args:
            obj: The object.
        """
        if obj.docstring is not None:
            value = re.sub(r"^(\s*)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = value.replace(":math:", "")
