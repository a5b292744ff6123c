"""Accessibility of a page in a real browser, by axe-core."""

from axe_playwright_python.sync_playwright import Axe

GRAVE = ("serious", "critical")
RULES = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]}


def grave_findings(page) -> list[str]:
    """What axe-core finds serious or critical on the page as it stands: a line for each element."""
    found = Axe().run(page, options={"resultTypes": ["violations"], **RULES}).response["violations"]
    return [
        f"{one['id']} ({one['impact']}) {node['target']}: {' '.join(node['failureSummary'].split())}"
        for one in found
        if one["impact"] in GRAVE
        for node in one["nodes"]
    ]
