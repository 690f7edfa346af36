"""Runs prompts on a ComfyUI server and gathers what it tells a browser."""

import json
import struct
import time
import urllib.request
import uuid
from collections import defaultdict
from types import SimpleNamespace

import websocket

TEXT_EVENT = 3  # of ComfyUI's binary messages: 4 bytes type, 4 bytes length of the node's id, the id, the text


def get(server, path):
    with urllib.request.urlopen(server.url + path) as response:
        return json.load(response)


def post(server, path, **content):
    request = urllib.request.Request(
        server.url + path, json.dumps(content).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as response:
        return response.read()


def run(server, prompt, on_progress=lambda: None):
    """How a prompt ended, the texts shown on each node meanwhile, and what each node reported."""
    client = uuid.uuid4().hex
    socket = websocket.create_connection(f"ws{server.url.removeprefix('http')}/ws?clientId={client}", timeout=120)
    texts = defaultdict(list)
    prompt_id = json.loads(post(server, "/prompt", prompt=prompt, client_id=client))["prompt_id"]
    while True:
        message = socket.recv()
        if isinstance(message, bytes):
            if struct.unpack(">I", message[:4])[0] == TEXT_EVENT:
                end = 8 + struct.unpack(">I", message[4:8])[0]
                texts[message[8:end].decode()].append(message[end:].decode())
            continue
        event = json.loads(message)
        if event["type"] == "progress":
            on_progress()
        if event["type"] in {"execution_success", "execution_error", "execution_interrupted"}:
            break
    socket.close()
    return SimpleNamespace(end=event["type"], data=event["data"], texts=texts, outputs=outputs_of(server, prompt_id))


def outputs_of(server, prompt_id):
    """From the history, which lags a little behind the events."""
    deadline = time.monotonic() + 10
    while not (history := get(server, f"/history/{prompt_id}")) and time.monotonic() < deadline:
        time.sleep(0.05)
    return history[prompt_id]["outputs"]


def node_id(prompt, class_type):
    return next(id_ for id_, node in prompt.items() if node["class_type"] == class_type)
