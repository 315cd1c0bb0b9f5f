"""Links that work in the repository and on the site: pages know their place in the repository, links are moved to the site's."""

import posixpath
import re
from collections.abc import Collection
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Pages that do not lie in docs/: place on the site, file in the repository.
OUTSIDE = {"index.md": "README.md", "benchmarks/RESULTS.md": "benchmarks/RESULTS.md", "CHANGELOG.md": "CHANGELOG.md"}
_LINK = re.compile(r"\[([^\[\]]*)\]\(([^()\s]+)\)")
_FENCED = re.compile(r"(^```.*?^```)", re.MULTILINE | re.DOTALL)


def repository_path(page: str) -> str:
    """Find the file of a page.

    Args:
        page: Place on the site.

    Returns:
        Path from the repository's root.
    """
    return OUTSIDE.get(page, f"docs/{page}")


def relink(markdown: str, page: str, pages: Collection[str]) -> str:
    """Turn links between files of the repository into links between pages.

    Args:
        markdown: Text of the page.
        page: Its place on the site.
        pages: Places of all pages.

    Returns:
        The text. A link to a file that is no page is left as its words; one to nothing is left for mkdocs to complain about.
    """
    places = {repository_path(place): place for place in pages}

    def moved(match: re.Match[str]) -> str:
        words, target = match.groups()
        path, hash_mark, anchor = target.partition("#")
        if not path or "://" in path or path.startswith("mailto:"):
            return match[0]
        file = posixpath.normpath(posixpath.join(posixpath.dirname(repository_path(page)), path))
        if file in places:
            return f"[{words}]({posixpath.relpath(places[file], posixpath.dirname(page) or '.')}{hash_mark}{anchor})"
        return words if not file.startswith("..") and (ROOT / file).exists() else match[0]

    parts = _FENCED.split(markdown)
    return "".join(part if part.startswith("```") else _LINK.sub(moved, part) for part in parts)
