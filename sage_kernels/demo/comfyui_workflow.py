"""A workflow as ComfyUI's frontend saves it -> the prompt that ComfyUI's HTTP API runs.

The frontend does this in the browser; the server only knows prompts. Covers what workflows of plain nodes need: links,
widgets, muted and bypassed nodes, notes. Not subgraphs, reroutes and primitive nodes, which it refuses.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Workflow = Mapping[str, Any]
Prompt = dict[str, dict[str, Any]]
# Node type -> what /object_info says about it.
NodeInfo = Mapping[str, Mapping[str, Any]]

_NOTES = frozenset({"Note", "MarkdownNote"})
_MUTED, _BYPASSED = 2, 4
_WIDGET_TYPES = frozenset({"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"})
_NODE_ID, _OUTPUT_SLOT = 1, 2  # of a link: [id, from node, from slot, to node, to slot, type]


class WorkflowError(ValueError):
    """A workflow that can't be turned into a prompt; the message is one line."""


def node_types(workflow: Workflow) -> set[str]:
    """Types of the nodes that the server has to know."""
    return {node["type"] for node in workflow["nodes"] if node["type"] not in _NOTES}


def to_prompt(workflow: Workflow, node_info: NodeInfo) -> Prompt:
    """Turn a saved workflow into a prompt.

    Raises:
        WorkflowError: a node that the server doesn't know, or whose saved values don't fit its definition.
    """
    nodes = {node["id"]: node for node in workflow["nodes"] if node["type"] not in _NOTES}
    unknown = sorted(node_types(workflow) - node_info.keys())
    if unknown:
        names = ", ".join(unknown)
        raise WorkflowError(f"this ComfyUI has no node {names}; install its pack, or see the log for why it is missing")
    links = {link[0]: link for link in workflow["links"]}
    prompt: Prompt = {}
    for node in nodes.values():
        if node.get("mode", 0) in {_MUTED, _BYPASSED}:
            continue
        inputs = _widget_values(node, node_info[node["type"]])
        for slot in node.get("inputs", ()):
            source = _source(slot.get("link"), links, nodes)
            if source is not None:
                inputs[slot["name"]] = source
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def override_inputs(prompt: Prompt, overrides: Mapping[str, Mapping[str, Any]]) -> Prompt:
    """A copy of the prompt where every node of a type in `overrides` has the inputs given there.

    Raises:
        WorkflowError: no node of that type, or no such input.
    """
    changed = {node_id: {**node, "inputs": dict(node["inputs"])} for node_id, node in prompt.items()}
    for node_type, values in overrides.items():
        inputs_of_type = [node["inputs"] for node in changed.values() if node["class_type"] == node_type]
        if not inputs_of_type:
            present = ", ".join(sorted({node["class_type"] for node in changed.values()}))
            raise WorkflowError(f"the workflow has no node {node_type}; it has {present}")
        for inputs in inputs_of_type:
            unknown = sorted(values.keys() - inputs.keys())
            if unknown:
                raise WorkflowError(f"{node_type} has no input {', '.join(unknown)}; it has {', '.join(inputs)}")
            inputs.update(values)
    return changed


def _widget_values(node: Mapping[str, Any], info: Mapping[str, Any]) -> dict[str, Any]:
    """Values typed into a node, by input name; the frontend saves them as a bare list in the node's input order."""
    saved = list(node.get("widgets_values") or ())
    values: dict[str, Any] = {}
    taken = 0
    for name, specification in _inputs_in_order(info):
        if not _is_widget(specification):
            continue
        if taken < len(saved):
            values[name] = saved[taken]
        taken += 2 if _options(specification).get("control_after_generate") else 1  # "fixed", "randomize", ...
    if taken != len(saved):
        raise WorkflowError(
            f"node {node['id']} ({node['type']}) has {len(saved)} saved values where this ComfyUI's node has {taken}; "
            "open the workflow in ComfyUI and save it again"
        )
    return values


def _inputs_in_order(info: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [
        (name, info["input"][group][name])
        for group in ("required", "optional")
        for name in info["input_order"].get(group, ())
    ]


def _is_widget(specification: Any) -> bool:
    kind = specification[0]
    return (isinstance(kind, list) or kind in _WIDGET_TYPES) and not _options(specification).get("forceInput")


def _options(specification: Any) -> Mapping[str, Any]:
    return specification[1] if len(specification) > 1 else {}


def _source(link_id: int | None, links: Mapping[int, Any], nodes: Mapping[int, Any]) -> list[Any] | None:
    """[node id, output slot] that feeds a link, seen through bypassed nodes; None where nothing does."""
    while link_id is not None:
        link = links[link_id]
        node = nodes[link[_NODE_ID]]
        mode = node.get("mode", 0)
        if mode == _MUTED:
            return None
        if mode != _BYPASSED:
            return [str(node["id"]), link[_OUTPUT_SLOT]]
        wanted = node["outputs"][link[_OUTPUT_SLOT]]["type"]
        link_id = next((slot.get("link") for slot in node.get("inputs", ()) if slot["type"] == wanted), None)
    return None
