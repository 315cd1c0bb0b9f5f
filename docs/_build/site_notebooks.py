"""Notebook pages: links between pages, plotly from the site, nothing from elsewhere."""

import posixpath
import re
from collections.abc import Collection

import site_links

RENDERER = "notebook_connected"  # of plotly: figures as HTML that loads plotly.js, which is then loaded from the site
_PLOTLY = re.compile(r'<script[^>]*src="https://cdn\.plot\.ly/[^"]*"[^>]*></script>')
_PLOTLY_MODULE = re.compile(r'<script type="module">import "https://cdn\.plot\.ly/[^"]*"</script>')
_MATHJAX = re.compile(r'<script[^>]*src="https://cdnjs\.cloudflare\.com/ajax/libs/mathjax/[^"]*"[^>]*></script>')
_MERMAID = re.compile(r'<script type="module">(?:(?!</script>).)*?mermaid.*?</script>', re.DOTALL)
_PAGE_LINK = re.compile(r'href="([^":#]+\.(?:md|ipynb))(#[^"]*)?"')


def localized(html: str, page: str, pages: Collection[str]) -> str:
    """Make a converted notebook part of the site.

    Args:
        html: From nbconvert.
        page: The notebook's place on the site.
        pages: Places of all pages.

    Returns:
        The same without scripts from elsewhere, and with a link to the notebook itself.

    Raises:
        ValueError: If a link leads to a file that is no page.
    """
    plotly = posixpath.relpath("assets/plotly.min.js", posixpath.dirname(page) or ".")
    html = _PLOTLY.sub(f'<script src="{plotly}"></script>', html, count=1)
    for pattern in (_PLOTLY, _PLOTLY_MODULE, _MATHJAX, _MERMAID):
        html = pattern.sub("", html)
    places = {site_links.repository_path(place): place for place in pages}

    def moved(match: re.Match[str]) -> str:
        file = posixpath.normpath(posixpath.join(posixpath.dirname(site_links.repository_path(page)), match[1]))
        if file not in places:
            raise ValueError(f"link to {match[1]}, which is no page of the site")
        target = posixpath.relpath(places[file], posixpath.dirname(page) or ".")
        return f'href="{posixpath.splitext(target)[0]}.html{match[2] or ""}"'

    html = _PAGE_LINK.sub(moved, html)
    return f'<p><a href="{posixpath.basename(page)}" download>This page as a notebook</a></p>{html}'
