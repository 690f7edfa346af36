"""The workflows that ComfyUI offers as templates: the graph holds together and our nodes' values are allowed."""

import json
from pathlib import Path

import pytest

from sage_kernels.block_overrides import parse_block_overrides

FOLDER = Path(__file__).parents[1] / "workflows"
WORKFLOWS = sorted(FOLDER.glob("*.json"))
JPEG = b"\xff\xd8\xff"
NAME, TYPE, LINK = "name", "type", "link"


@pytest.fixture(params=WORKFLOWS, ids=lambda path: path.stem)
def path(request):
    return request.param


@pytest.fixture
def workflow(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_promised_workflows_are_there():
    names = {path.stem for path in WORKFLOWS}
    assert names >= {"sage3_demo", "wan22_t2v_fp4", "flux_fp4", "hunyuan_video_fp4"}


def test_every_workflow_has_a_thumbnail_and_every_thumbnail_a_workflow(path):
    assert path.with_suffix(".jpg").read_bytes().startswith(JPEG)
    assert {path.stem for path in FOLDER.glob("*.jpg")} == {path.stem for path in WORKFLOWS}


def test_ids_are_unique_and_below_the_counters(workflow):
    for ids, last in (
        ([node["id"] for node in workflow["nodes"]], workflow["last_node_id"]),
        ([link[0] for link in workflow["links"]], workflow["last_link_id"]),
    ):
        assert len(set(ids)) == len(ids)
        assert max(ids) <= last


def test_links_say_the_same_as_the_nodes_at_both_ends(workflow):
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for link, source, output, target, slot, kind in workflow["links"]:
        sends, receives = nodes[source]["outputs"][output], nodes[target]["inputs"][slot]
        assert link in sends["links"]
        assert receives[LINK] == link
        assert sends[TYPE] == kind
        assert receives[TYPE] in {kind, "*"}
    known = {link[0] for link in workflow["links"]}
    for node in nodes.values():
        held = [slot[LINK] for slot in node.get("inputs", ()) if slot[LINK] is not None]
        held += [link for slot in node.get("outputs", ()) for link in slot["links"] or ()]
        assert known.issuperset(held)


def test_values_of_our_nodes_are_allowed(workflow, node_schemas):
    ours = [node for node in workflow["nodes"] if node["type"].startswith("Sage3")]
    assert ours
    for node in ours:
        sockets = {slot[NAME] for slot in node.get("inputs", ())}
        values = iter(node["widgets_values"])
        for widget in node_schemas[node["type"]].inputs:
            if widget.widget and widget.id not in sockets:
                assert_allowed(widget, next(values))
                if widget.control_after_generate:
                    assert next(values) in {"fixed", "increment", "decrement", "randomize"}
        assert not list(values), f"{node['type']} has more saved values than inputs"


def assert_allowed(widget, value):
    if widget.id == "fp16_blocks":
        parse_block_overrides(value)
    if widget.options is not None:
        assert value in widget.options
    if widget.minimum is not None:
        assert value >= widget.minimum
    if widget.maximum is not None:
        assert value <= widget.maximum
    if widget.type == "Boolean":
        assert isinstance(value, bool)
