"""ComfyUI's event stream: what a server tells one client about its prompts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import websocket


class EventStream:
    """The JSON events that a ComfyUI server sends to one client; previews, which are binary, are left out.

    Use as a context manager, and open it before queueing a prompt, so that no event is missed.
    """

    def __init__(self, url: str, client_id: str, timeout_s: float) -> None:
        """Connect.

        Args:
            url: of the server, such as http://127.0.0.1:8188.
            client_id: the one that the prompt is queued under.
            timeout_s: longest silence before TimeoutError.

        Raises:
            OSError: nothing answers there, or it offers no event stream.
        """
        address = f"ws{url.removeprefix('http')}/ws?clientId={client_id}"
        try:
            self._socket = websocket.create_connection(address, timeout=timeout_s)
        except websocket.WebSocketTimeoutException:
            raise TimeoutError(f"{url} did not answer within {timeout_s:g} s") from None
        except websocket.WebSocketException as error:
            raise ConnectionError(f"{url} does not offer ComfyUI's event stream: {error}") from None

    def __enter__(self) -> EventStream:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (type, data) until the connection ends, which raises ConnectionError."""
        while True:
            try:
                message = self._socket.recv()
            except websocket.WebSocketTimeoutException:
                raise TimeoutError("ComfyUI's event stream went silent") from None
            except websocket.WebSocketException as error:
                raise ConnectionError(f"ComfyUI's event stream broke off: {error}") from None
            if isinstance(message, bytes):
                continue
            if not message:
                raise ConnectionError("ComfyUI closed its event stream")
            event = json.loads(message)
            yield event["type"], event.get("data") or {}
