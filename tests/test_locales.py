"""The texts in locales/: the English ones are those of the nodes themselves, the others have the same entries."""

import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "locales"
# Languages that ComfyUI's frontend offers, in 0.3.64 already; it has no German.
OFFERED = {"en", "zh", "zh-TW", "ru", "ja", "ko", "fr", "es", "ar"}
TRANSLATIONS = sorted(path.name for path in FOLDER.iterdir() if path.name != "en")


def texts(language):
    return json.loads((FOLDER / language / "nodeDefs.json").read_text(encoding="utf-8"))


def test_english_texts_are_those_of_the_nodes(node_schemas):
    expected = {
        node_id: {
            "display_name": schema.display_name,
            "description": schema.description,
            "inputs": {
                item.id: {"name": item.id, **({"tooltip": item.tooltip} if item.tooltip else {})}
                for item in schema.inputs
            },
        }
        for node_id, schema in node_schemas.items()
    }
    assert texts("en") == expected


def test_there_is_a_translation_that_comfyui_offers():
    assert TRANSLATIONS
    assert set(TRANSLATIONS) <= OFFERED


@pytest.mark.parametrize("language", TRANSLATIONS)
def test_a_translation_has_the_entries_of_the_english_texts(language):
    english, translated = texts("en"), texts(language)
    assert keys(translated) == keys(english)
    assert not [path for path, text in leaves(translated) if not text.strip()]
    descriptions = [(english[node]["description"], translated[node]["description"]) for node in english]
    assert not [text for text, other in descriptions if text == other]


def keys(entries):
    return {path for path, _ in leaves(entries)}


def leaves(entries, path=()):
    for key, value in entries.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value
