"""Links of the README and of all other Markdown files, as they are read in the repository itself.

`tests/test_docs.py` checks those of the built site.
"""

import re
from functools import cache
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "bench/**/*.md", "examples/**/*.md", "vllm_wsi/**/*.md")
    for path in ROOT.glob(pattern)
)
HOST = re.compile(r"(?:[a-z0-9](?:[a-z0-9-]*[a-z0-9])?\.)+[a-z]{2,}", re.IGNORECASE)
LOCAL = ("localhost", "127.0.0.1")  # where the reader's own server answers


@cache
def tokens(page: Path) -> list:
    parsed = MarkdownIt("commonmark").enable("table").parse(page.read_text())
    return [child for token in parsed for child in (token, *(token.children or ()))]


def links(page: Path) -> list[str]:
    return [str(one.attrs["href" if one.type == "link_open" else "src"])
            for one in tokens(page) if one.type in {"link_open", "image"}]  # fmt: skip


@cache
def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them: lower case, no punctuation, a dash for each space."""
    found: set[str] = set()
    headings = [after for token, after in pairwise(tokens(page)) if token.type == "heading_open"]
    for heading in headings:
        text = "".join(one.content for one in heading.children if one.type in {"text", "code_inline"})
        name = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        repeated = sum(one == name or re.fullmatch(re.escape(name) + r"-\d+", one) is not None for one in found)
        found.add(f"{name}-{repeated}" if repeated else name)
    return found


def broken(page: Path, link: str) -> str:
    """Why a link leads nowhere; empty: it leads somewhere, or is well-formed where it leaves the repository."""
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        is_local = parts.scheme == "http" and parts.hostname in LOCAL
        is_web = parts.scheme == "https" and HOST.fullmatch(parts.hostname or "") is not None
        return "" if (is_local or is_web) and not re.search(r"\s", link) else "wanted https://HOST/.."
    target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
    if ROOT not in target.parents:
        return "leads out of the repository"
    if not target.exists():
        return "no such file"
    if parts.fragment and (target.suffix != ".md" or parts.fragment not in anchors(target)):
        return "no such heading"
    return ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_and_picture_leads_to_a_file_and_a_heading_that_are_there(page):
    assert {link: why for link in links(page) if (why := broken(page, link))} == {}


def test_the_readme_leads_to_each_of_the_four_readers_first_page():
    wanted = {f"docs/{part}/index.md" for part in ("serve", "slides", "measure", "train")}
    assert wanted <= set(links(ROOT / "README.md"))


@pytest.mark.parametrize(
    "link",
    ["docs/no-such-page.md", "docs/install.md#no-such-heading", "#no-such-heading", "../outside.md", "https://nowhere",
     "http://example.org/", "https://exa mple.org/", "ftp://example.org/"],
)  # fmt: skip
def test_a_link_that_leads_nowhere_is_told(link):
    assert broken(ROOT / "README.md", link)
