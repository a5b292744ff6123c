"""A hook of mkdocs: which files the site has, and where they lie in it.

The site has the repository's own tree: `docs/` stays `docs/`, and the Markdown and data files that the pages link to
keep their paths. So one relative link is right on the site and where the repository is read, and
`mkdocs build --strict` checks all of them. README.md is the site's first page.
"""

from __future__ import annotations

import re
from pathlib import Path

from docs_reference import GENERATED
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

BESIDE = (
    "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "bench/README.md", "bench/results/**/*.md",
    "bench/results/**/*.csv", "bench/results/**/*.png", "vllm_wsi/**/README.md", "examples/**/*.md",
    "examples/**/*.py", "examples/**/*.ipynb", "examples/**/*.yaml",
)  # fmt: skip
"""Files outside `docs/` that a page may link to."""
MARK = re.compile(r"^<!-- generated: ([a-z-]+) -->$", re.MULTILINE)
"""A line of a page in whose place the site has what `docs_reference` makes of the code."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Puts each file at its path in the repository."""
    root = Path(config.config_file_path).parent
    placed = [
        _at(config, f"docs/{file.src_uri}", file.abs_src_path) if file.src_dir == config.docs_dir else file
        for file in files
    ]
    beside = {path for pattern in BESIDE for path in root.glob(pattern)}
    placed += [_at(config, path.relative_to(root).as_posix(), str(path)) for path in sorted(beside)]
    return Files(placed)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fills in what is generated."""

    def generated(mark: re.Match[str]) -> str:
        if mark[1] not in GENERATED:
            raise PluginError(f"{page.file.src_uri}: found {mark[0]}, wanted one of {', '.join(GENERATED)}")
        return GENERATED[mark[1]]()

    return MARK.sub(generated, markdown)


def _at(config: MkDocsConfig, path: str, source: str | None) -> File:
    return File.generated(config, path, abs_src_path=source)
