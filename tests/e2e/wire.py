"""A proxy that records every byte sent by the client, and a parser for the recorded requests."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from dataclasses import dataclass, field
from typing import Self

IDS = re.compile(r"\b([a-z]{2,4})_[0-9A-Za-z]{8,}")
UUID4 = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")


@dataclass(frozen=True)
class Request:
    """One HTTP request; server-generated ids and random keys, which aren't private data, are masked."""

    line: str
    headers: tuple[str, ...]
    body: bytes

    @property
    def is_upload(self) -> bool:
        return self.line.startswith("POST /v1/prompts ")


@dataclass
class Wiretap:
    """Forwards bytes to ``port`` and records those that the client sends, per connection."""

    port: int
    sent: list[bytearray] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._listening = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listening.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listening.getsockname()[1]}"

    def take(self) -> list[bytes]:
        """The bytes sent since the last call, per connection."""
        recorded, self.sent = [bytes(stream) for stream in self.sent], []
        return recorded

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                server = socket.create_connection(("127.0.0.1", self.port))
                record = bytearray()
                self.sent.append(record)
                threading.Thread(target=_forward, args=(client, server, record), daemon=True).start()
                threading.Thread(target=_forward, args=(server, client, None), daemon=True).start()


def _forward(source: socket.socket, sink: socket.socket, record: bytearray | None) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            if record is not None:
                record.extend(data)
            sink.sendall(data)
    for end in (source, sink):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


def requests_in(sent: list[bytes]) -> list[Request]:
    """All requests in order; consecutive identical requests (polling) count once.

    Every byte must belong to a complete request of known length.
    """
    requests: list[Request] = []
    for stream in sent:
        while stream:
            head, ends, rest = stream.partition(b"\r\n\r\n")
            assert ends, f"not a request: {head[:80]!r}"
            line, *headers = head.decode("ascii").split("\r\n")
            length = next((int(h.split(":")[1]) for h in headers if h.lower().startswith("content-length:")), 0)
            assert not any(header.lower().startswith("transfer-encoding") for header in headers)
            assert len(rest) >= length
            request = Request(_masked(line), tuple(map(_masked, headers)), _masked_body(rest[:length]))
            if not requests or requests[-1] != request:
                requests.append(request)
            stream = rest[length:]
    return requests


def _masked(text: str) -> str:
    return IDS.sub(r"\1_*", UUID4.sub("*", text))


def _masked_body(body: bytes) -> bytes:
    return _masked(body.decode()).encode() if body.startswith(b"{") else body
