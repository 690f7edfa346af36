"""The demo's ComfyUI client against stand-ins: saved workflow to prompt, event stream, starting and stopping."""

import base64
import hashlib
import json
import re
import socket
import sys
import threading
import urllib.request
from pathlib import Path

import pytest

WORKFLOW = Path(__file__).parents[1] / "workflows" / "sage3_demo.json"
MUTED, BYPASSED = 2, 4


def info(**inputs):
    return {"input": {"required": inputs}, "input_order": {"required": list(inputs)}}


NODE_INFO = {
    "Loader": info(name=[["a", "b"]], kind=["COMBO", {"options": ["x"]}]),
    "Patch": info(model=["MODEL"], strength=["FLOAT", {}]),
    "Sampler": info(model=["MODEL"], seed=["INT", {"control_after_generate": True}], steps=["INT", {}]),
}


def node(number, kind, widgets, link=None, mode=0):
    inputs = [] if link is None else [{"name": "model", "type": "MODEL", "link": link}]
    outputs = [{"name": "MODEL", "type": "MODEL"}]
    return {"id": number, "type": kind, "mode": mode, "widgets_values": widgets, "inputs": inputs, "outputs": outputs}


def chain(patch_mode=0):
    return {
        "nodes": [
            node(1, "Loader", ["b", "x"]),
            node(2, "Patch", [0.5], link=1, mode=patch_mode),
            node(3, "Sampler", [42, "randomize", 20], link=2),
            {"id": 4, "type": "MarkdownNote", "widgets_values": ["text"]},
        ],
        "links": [[1, 1, 0, 2, 0, "MODEL"], [2, 2, 0, 3, 0, "MODEL"]],
    }


@pytest.fixture
def workflows(demo):
    return demo("comfyui_workflow")


def test_saved_values_become_named_inputs(workflows):
    assert workflows.to_prompt(chain(), NODE_INFO) == {
        "1": {"class_type": "Loader", "inputs": {"name": "b", "kind": "x"}},
        "2": {"class_type": "Patch", "inputs": {"strength": 0.5, "model": ["1", 0]}},
        "3": {"class_type": "Sampler", "inputs": {"seed": 42, "steps": 20, "model": ["2", 0]}},
    }


def test_bypassed_node_passes_its_input_on(workflows):
    prompt = workflows.to_prompt(chain(patch_mode=BYPASSED), NODE_INFO)
    assert set(prompt) == {"1", "3"}
    assert prompt["3"]["inputs"]["model"] == ["1", 0]


def test_muted_node_feeds_nothing(workflows):
    prompt = workflows.to_prompt(chain(patch_mode=MUTED), NODE_INFO)
    assert set(prompt) == {"1", "3"}
    assert "model" not in prompt["3"]["inputs"]


def test_linked_widget_takes_the_link_over_its_saved_value(workflows):
    workflow = chain()
    workflow["nodes"][2]["inputs"].append({"name": "steps", "type": "INT", "link": 3})
    workflow["links"].append([3, 1, 1, 3, 1, "INT"])
    assert workflows.to_prompt(workflow, NODE_INFO)["3"]["inputs"]["steps"] == ["1", 1]


def test_unknown_node_is_named(workflows):
    without_patch = {kind: NODE_INFO[kind] for kind in ("Loader", "Sampler")}
    with pytest.raises(workflows.WorkflowError, match="no node Patch"):
        workflows.to_prompt(chain(), without_patch)


def test_saved_values_that_do_not_fit_are_refused(workflows):
    workflow = chain()
    workflow["nodes"][0]["widgets_values"].append("left over")
    with pytest.raises(workflows.WorkflowError, match="3 saved values where this ComfyUI's node has 2"):
        workflows.to_prompt(workflow, NODE_INFO)


def test_overrides_change_a_copy(workflows):
    prompt = workflows.to_prompt(chain(), NODE_INFO)
    changed = workflows.override_inputs(prompt, {"Sampler": {"steps": 4}})
    assert changed["3"]["inputs"]["steps"] == 4
    assert prompt["3"]["inputs"]["steps"] == 20


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [({"Decoder": {"x": 1}}, "no node Decoder; it has Loader"), ({"Patch": {"x": 1}}, "no input x; it has strength")],
)
def test_overrides_that_fit_nothing_are_refused(workflows, overrides, complaint):
    with pytest.raises(workflows.WorkflowError, match=complaint):
        workflows.override_inputs(workflows.to_prompt(chain(), NODE_INFO), overrides)


def test_links_of_the_shipped_workflow_agree_with_its_nodes():
    workflow = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for link, source, output, target, slot, kind in workflow["links"]:
        assert link in nodes[source]["outputs"][output]["links"]
        assert nodes[target]["inputs"][slot]["link"] == link
        assert nodes[source]["outputs"][output]["type"] == nodes[target]["inputs"][slot]["type"] == kind
    linked = [slot["link"] for node in workflow["nodes"] for slot in node["inputs"] if slot["link"] is not None]
    assert sorted(linked) == sorted(link[0] for link in workflow["links"])


def test_shipped_workflow_samples_as_the_demo_does(demo):
    workflow = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    values = {node["type"]: node["widgets_values"] for node in workflow["nodes"]}
    sampling = demo("sampling")
    assert values["ModelSamplingSD3"] == [sampling.DEFAULT_SHIFT]
    _, _, steps, cfg, sampler, scheduler, denoise = values["KSampler"]
    assert (steps, cfg, sampler, scheduler, denoise) == (sampling.DEFAULT_STEPS, 1.0, "euler", "simple", 1.0)
    width, height, length, _ = values["EmptyHunyuanLatentVideo"]
    assert ((length - 1) // 4 + 1, height // 8, width // 8) == sampling.LATENT_SHAPE[1:]
    assert values["UNETLoader"][0] == demo("wan_checkpoint").DEFAULT_WEIGHTS.name


def frame(opcode, payload):
    size = len(payload)
    return bytes([opcode | 0x80]) + (bytes([size]) if size < 126 else b"\x7e" + size.to_bytes(2, "big")) + payload


TEXT, BINARY, CLOSE = 1, 2, 8
HANDSHAKE_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, section 1.3


@pytest.fixture
def event_server():
    """A server for one client: answers its handshake, or refuses it, sends frames and hangs up; gives its url."""
    listener = socket.create_server(("127.0.0.1", 0))
    threads = []

    def serve(*frames, status=b"101 Switching Protocols"):
        def run():
            connection, _ = listener.accept()
            with connection:
                key = re.search(rb"Sec-WebSocket-Key: (\S+)", connection.recv(4096))[1]
                accept = base64.b64encode(hashlib.sha1(key + HANDSHAKE_GUID).digest())
                head = [b"HTTP/1.1 " + status, b"Upgrade: websocket", b"Connection: Upgrade"]
                head += [b"Sec-WebSocket-Accept: " + accept, b"", b""]
                connection.sendall(b"\r\n".join(head) + b"".join(frames))
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(4096):
                    pass

        threads.append(threading.Thread(target=run))
        threads[-1].start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    yield serve
    for thread in threads:
        thread.join(timeout=10)
    listener.close()


def test_events_are_read_and_previews_left_out(demo, event_server):
    text = json.dumps({"type": "progress", "data": {"text": "x" * 300}}).encode()
    url = event_server(
        frame(TEXT, b'{"type": "status"}'), frame(BINARY, b"a preview"), frame(TEXT, text), frame(CLOSE, b"")
    )
    with demo("comfyui_events").EventStream(url, "me", timeout_s=10) as stream:
        events = iter(stream)
        assert next(events) == ("status", {})
        assert next(events) == ("progress", {"text": "x" * 300})
        with pytest.raises(ConnectionError, match="closed"):
            next(events)


def test_server_without_events_is_refused(demo, event_server):
    url = event_server(status=b"404 Not Found")
    with pytest.raises(ConnectionError, match="404 Not Found"):
        demo("comfyui_events").EventStream(url, "me", timeout_s=10)


def test_stream_that_breaks_off_is_an_error(demo, event_server):
    url = event_server(frame(TEXT, b'{"type": "status"}')[:5])
    with (
        demo("comfyui_events").EventStream(url, "me", timeout_s=10) as stream,
        pytest.raises(ConnectionError, match="broke off"),
    ):
        next(iter(stream))


def test_silence_is_an_error(demo):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(TimeoutError):
            demo("comfyui_events").EventStream(url, "me", timeout_s=0.2)


STAND_IN = """
import http.server, pathlib, sys
base = pathlib.Path(sys.argv[sys.argv.index("--base-directory") + 1])
assert (base / "custom_nodes" / "sage3-attention" / "__init__.py").exists()
print("cpu" if "--cpu" in sys.argv else "gpu", flush=True)
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.ThreadingHTTPServer(("127.0.0.1", port), type("H", (http.server.BaseHTTPRequestHandler,), {
    "do_GET": lambda self: (self.send_response(200), self.end_headers()),
    "log_message": lambda *_: None,
})).serve_forever()
"""


def checkout(folder, main):
    (folder / "main.py").write_text(main)
    return folder


@pytest.mark.parametrize("cpu", [True, False])
def test_server_runs_with_the_pack_and_leaves_nothing(demo, tmp_path, cpu):
    with demo("comfyui_server").ComfyServer(checkout(tmp_path, STAND_IN), python=sys.executable, cpu=cpu) as server:
        base = server.base
        assert urllib.request.urlopen(f"{server.url}/system_stats").status == 200
        assert server.log().strip() == ("cpu" if cpu else "gpu")
    assert not base.exists()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"{server.url}/system_stats", timeout=5)
    assert (WORKFLOW.parents[1] / "__init__.py").exists()  # the link went, not what it leads to


def test_server_can_import_what_lies_beside_it(demo, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    (tmp_path / "beside.py").touch()
    with demo("comfyui_server").ComfyServer(
        checkout(tmp_path, f"import beside\n{STAND_IN}"), python=sys.executable
    ) as server:
        assert urllib.request.urlopen(f"{server.url}/system_stats").status == 200


def test_server_that_fails_shows_its_last_lines(demo, tmp_path):
    module = demo("comfyui_server")
    root = checkout(tmp_path, "raise SystemExit('No module named aiohttp')")
    with (
        pytest.raises(module.ComfyServerError, match=r"exit code 1(?s:.*)No module named aiohttp"),
        module.ComfyServer(root, python=sys.executable),
    ):
        pass


def test_server_that_never_answers_is_stopped(demo, tmp_path):
    module = demo("comfyui_server")
    root = checkout(tmp_path, "import time; time.sleep(60)")
    with (
        pytest.raises(module.ComfyServerError, match="did not answer within 1 s"),
        module.ComfyServer(root, python=sys.executable, start_timeout_s=1.0),
    ):
        pass


def test_folder_without_main_py_is_refused(demo, tmp_path):
    module = demo("comfyui_server")
    with pytest.raises(module.ComfyServerError, match=r"no main\.py"):
        module.ComfyServer(tmp_path)


def test_checkout_python_prefers_its_own_environment(demo, tmp_path):
    module = demo("comfyui_server")
    assert module.checkout_python(tmp_path) == sys.executable
    own = tmp_path / "venv" / "bin" / "python"
    own.parent.mkdir(parents=True)
    own.touch()
    assert module.checkout_python(tmp_path) == str(own)
