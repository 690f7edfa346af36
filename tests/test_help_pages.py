"""Every node has its page in nodes/web/docs, which ComfyUI shows as its help, and the page names every widget."""

import re
from pathlib import Path

PAGES = Path(__file__).parents[1] / "nodes" / "web" / "docs"


def test_every_node_has_a_page_and_every_page_a_node(node_schemas):
    assert {page.stem for page in PAGES.glob("*.md")} == set(node_schemas)


def test_pages_name_every_widget(node_schemas):
    missing = [
        (node_id, item.id)
        for node_id, schema in node_schemas.items()
        for item in schema.inputs
        if item.widget and item.id not in (PAGES / f"{node_id}.md").read_text(encoding="utf-8")
    ]
    assert not missing


def test_pages_show_pictures_that_are_there_and_every_instrument_has_one(node_schemas):
    shown = {
        page.stem: re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
        for page in PAGES.glob("*.md")
    }
    assert {name for names in shown.values() for name in names} == {path.name for path in PAGES.glob("*.png")}
    without = {node_id for node_id in node_schemas if not shown[node_id]}
    assert without == {"Sage3DemoConditioning", "Sage3DemoDecode"}
    assert sum(path.stat().st_size for path in PAGES.glob("*.png")) < 1 << 20
