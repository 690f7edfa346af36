"""What the browser fetches of the pack from a real ComfyUI: translations, help pages, thumbnails."""

import json
import urllib.request
from pathlib import Path

import pytest

pytestmark = pytest.mark.comfyui

ROOT = Path(__file__).parents[2]
PACK = "sage3-attention"


@pytest.fixture(scope="module")
def fetch(server):
    def fetch(path):
        with urllib.request.urlopen(f"{server.url}{path}") as response:
            return response.read()

    return fetch


def test_translations_are_merged_into_those_of_comfyui(fetch):
    served = json.loads(fetch("/i18n"))
    for folder in (ROOT / "locales").iterdir():
        texts = json.loads((folder / "nodeDefs.json").read_text(encoding="utf-8"))
        assert served[folder.name]["nodeDefs"].items() >= texts.items()


@pytest.mark.parametrize("page", sorted((ROOT / "nodes/web/docs").glob("*.md")), ids=lambda path: path.stem)
def test_help_pages_are_where_the_browser_looks(fetch, page):
    assert fetch(f"/extensions/{PACK}/docs/{page.name}") == page.read_bytes()


@pytest.mark.parametrize("picture", sorted((ROOT / "workflows").glob("*.jpg")), ids=lambda path: path.stem)
def test_thumbnails_are_where_the_browser_looks(fetch, picture):
    assert fetch(f"/api/workflow_templates/{PACK}/{picture.name}") == picture.read_bytes()
