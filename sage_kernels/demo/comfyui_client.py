"""Run a saved workflow on a running ComfyUI through its HTTP API, and fetch the frames that it saves."""

from __future__ import annotations

import io
import json
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from PIL import Image

from .comfyui_events import EventStream
from .comfyui_workflow import Workflow, node_types, override_inputs, to_prompt

ProgressCallback = Callable[[int, int], None]

_ANSWER_TIMEOUT_S = 30.0
_HISTORY_DELAY_S = 10.0  # how long the history may lag behind the event that a prompt is done


class ComfyUIError(RuntimeError):
    """ComfyUI refused or failed a prompt; the message is one line."""


@dataclass(frozen=True)
class WorkflowRun:
    """What one run of a workflow gave.

    Attributes:
        frames: the images of all SaveImage nodes, in order.
        outputs: node id -> what the node reported (ComfyUI's "ui" outputs).
        calls: attention calls per kernel, as Sage3DemoDecode reports them; empty where the model isn't patched.
        coverage: the same as text, with the reasons of the kernels that stepped aside.
        seconds: from queueing to the end.
    """

    frames: Sequence[Image.Image]
    outputs: Mapping[str, Mapping[str, Any]]
    calls: Mapping[str, int]
    coverage: str
    seconds: float


def run_workflow(
    url: str,
    workflow: Path | Workflow,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    on_progress: ProgressCallback | None = None,
    *,
    timeout_s: float = 600.0,
) -> WorkflowRun:
    """Queue a workflow and wait for it.

    Args:
        url: of the server, such as http://127.0.0.1:8188.
        workflow: a saved workflow, or the path of one.
        overrides: node type -> input -> value, in place of what the workflow says.
        on_progress: called with the sampling steps done and their number.
        timeout_s: longest silence of the server.

    Raises:
        WorkflowError: the workflow doesn't fit this server, or an override doesn't fit the workflow.
        ComfyUIError: ComfyUI refused the prompt, or a node failed.
        OSError: nothing answers at the url, or not in time.
    """
    saved: Workflow = json.loads(workflow.read_text(encoding="utf-8")) if isinstance(workflow, Path) else workflow
    node_info: dict[str, Any] = {}
    for node_type in node_types(saved):
        node_info.update(_get_json(url, f"/object_info/{quote(node_type)}"))
    prompt = override_inputs(to_prompt(saved, node_info), overrides or {})
    client_id = uuid.uuid4().hex
    start = time.monotonic()
    with EventStream(url, client_id, timeout_s) as events:
        prompt_id = _queue(url, prompt, client_id)
        _wait(events, prompt_id, on_progress)
    seconds = time.monotonic() - start
    outputs = _history(url, prompt_id)["outputs"]
    files = [
        file
        for node_id, output in sorted(outputs.items(), key=lambda item: int(item[0]))
        if prompt[node_id]["class_type"] == "SaveImage"
        for file in output["images"]
    ]
    frames = [Image.open(io.BytesIO(fetch(url, file))) for file in files]
    report = next((output for output in outputs.values() if "calls" in output), None)
    calls, coverage = (report["calls"][0], report["text"][0]) if report else ({}, "")
    return WorkflowRun(frames, outputs, calls, coverage, seconds)


def fetch(url: str, file: Mapping[str, str]) -> bytes:
    """Content of a file that a node reports as {"filename", "subfolder", "type"}."""
    query = urlencode({key: file[key] for key in ("filename", "subfolder", "type")})
    with urllib.request.urlopen(f"{url}/view?{query}", timeout=_ANSWER_TIMEOUT_S) as response:
        return bytes(response.read())


def _queue(url: str, prompt: Mapping[str, Any], client_id: str) -> str:
    body = json.dumps({"prompt": prompt, "client_id": client_id}).encode()
    request = urllib.request.Request(f"{url}/prompt", data=body, headers={"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=_ANSWER_TIMEOUT_S) as response:
            return str(json.load(response)["prompt_id"])
    except urllib.error.HTTPError as error:
        raise ComfyUIError(f"ComfyUI refused the workflow: {_refusal(error.read())}") from None


def _refusal(body: bytes) -> str:
    """One line out of the server's answer: an overall error, and the errors of each node."""
    try:
        answer = json.loads(body)
    except ValueError:
        return body.decode(errors="replace").strip()
    reasons = [
        f"{node['class_type']}: {error['message']} ({error['details']})"
        for node in (answer.get("node_errors") or {}).values()
        for error in node["errors"]
    ]
    return "; ".join(dict.fromkeys(reasons)) or str(answer["error"]["message"])


def _wait(events: EventStream, prompt_id: str, on_progress: ProgressCallback | None) -> None:
    for kind, data in events:
        if data.get("prompt_id") != prompt_id:
            continue
        if kind == "progress" and on_progress is not None:
            on_progress(data["value"], data["max"])
        elif kind == "execution_error":
            raise ComfyUIError(f"{data['node_type']}: {data['exception_message'].strip()}")
        elif kind == "execution_interrupted":
            raise ComfyUIError("the run was interrupted in ComfyUI")
        elif kind == "execution_success":
            return


def _history(url: str, prompt_id: str) -> Mapping[str, Any]:
    deadline = time.monotonic() + _HISTORY_DELAY_S
    while time.monotonic() < deadline:
        history = _get_json(url, f"/history/{prompt_id}")
        if prompt_id in history:
            return dict(history[prompt_id])
        time.sleep(0.05)
    raise ComfyUIError(f"ComfyUI finished the workflow but has no history of it after {_HISTORY_DELAY_S:.0f} s")


def _get_json(url: str, path: str) -> Any:
    with urllib.request.urlopen(url + path, timeout=_ANSWER_TIMEOUT_S) as response:
        return json.load(response)
