"""ComfyUI's event stream: enough of WebSocket (RFC 6455) to listen, with the standard library alone."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

_TEXT, _CLOSE, _PING, _PONG = 0x1, 0x8, 0x9, 0xA
_FINAL = 0x80
_MASKED = 0x80
_LENGTH_16_BIT, _LENGTH_64_BIT = 126, 127


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
            OSError: nothing answers there, or it speaks no WebSocket.
        """
        host, port = urlsplit(url).hostname, urlsplit(url).port or 80
        self._socket = socket.create_connection((host, port), timeout=timeout_s)
        key = base64.b64encode(os.urandom(16)).decode()
        self._socket.sendall(
            f"GET /ws?clientId={client_id} HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        self._reader = self._socket.makefile("rb")
        status = self._reader.readline().decode("latin-1").strip()
        while self._reader.readline().strip():
            pass
        if " 101 " not in f"{status} ":
            self.close()
            raise ConnectionError(f"{url} does not offer ComfyUI's event stream: {status or 'no answer'}")

    def __enter__(self) -> EventStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (type, data) until the connection ends, which raises ConnectionError."""
        message = b""
        message_opcode = 0
        while True:
            head, opcode, payload = self._read_frame()
            if opcode == _CLOSE:
                raise ConnectionError("ComfyUI closed its event stream")
            if opcode == _PING:
                self._send(_PONG, payload)
            if opcode >= _CLOSE:
                continue
            message_opcode = opcode or message_opcode  # 0 continues the message before
            message += payload
            if head & _FINAL:
                if message_opcode == _TEXT:
                    event = json.loads(message)
                    yield event["type"], event.get("data") or {}
                message = b""

    def close(self) -> None:
        """Say goodbye and drop the connection."""
        with contextlib.suppress(OSError):
            self._send(_CLOSE)
        self._reader.close()
        self._socket.close()

    def _read_frame(self) -> tuple[int, int, bytes]:
        head, length = self._read_exactly(2)
        if length == _LENGTH_16_BIT:
            length = int.from_bytes(self._read_exactly(2), "big")
        elif length == _LENGTH_64_BIT:
            length = int.from_bytes(self._read_exactly(8), "big")
        return head, head & 0x0F, self._read_exactly(length)

    def _read_exactly(self, count: int) -> bytes:
        content = self._reader.read(count)
        if len(content) < count:
            raise ConnectionError("ComfyUI's event stream broke off")
        return content

    def _send(self, opcode: int, payload: bytes = b"") -> None:
        mask = os.urandom(4)
        masked = bytes(byte ^ mask[index % 4] for index, byte in enumerate(payload))
        self._socket.sendall(bytes([_FINAL | opcode, _MASKED | len(payload)]) + mask + masked)
