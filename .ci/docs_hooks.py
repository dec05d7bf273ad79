"""What mkdocs cannot know: pages of the repository that are not below docs/."""

from __future__ import annotations

import posixpath
import re
from typing import Any

LINK = re.compile(r"\[([^\]]+)\]\(([^)#:\s]+)\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """A link that leaves docs/ becomes its text and the path in the repository."""
    here = posixpath.dirname(page.file.src_uri)

    def inside(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(here, match[2]))
        if not target.startswith(".."):
            return match[0]
        path = target.removeprefix("../")
        return f"`{path}`" if match[1].strip("`").endswith(path) else f"{match[1]} (`{path}` in the repository)"

    return LINK.sub(inside, markdown)
