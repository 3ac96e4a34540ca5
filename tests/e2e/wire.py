"""A proxy that keeps every byte of the client, and what the requests in them are."""

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
    """One HTTP request, with the server's own names and random keys blotted out: those are no private data."""

    line: str
    headers: tuple[str, ...]
    body: bytes

    @property
    def is_upload(self) -> bool:
        return self.line.startswith("POST /v1/prompts ")


@dataclass
class Wiretap:
    """Passes bytes on to ``port`` and keeps those that the client sends, connection by connection."""

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
        """What was sent since the last time."""
        taken, self.sent = [bytes(each) for each in self.sent], []
        return taken

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                server = socket.create_connection(("127.0.0.1", self.port))
                kept = bytearray()
                self.sent.append(kept)
                threading.Thread(target=_pass, args=(client, server, kept), daemon=True).start()
                threading.Thread(target=_pass, args=(server, client, None), daemon=True).start()


def _pass(source: socket.socket, sink: socket.socket, kept: bytearray | None) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            if kept is not None:
                kept.extend(data)
            sink.sendall(data)
    for end in (source, sink):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


def requests_in(sent: list[bytes]) -> list[Request]:
    """All requests, in their order; one that is repeated at once (a job is asked after) counts once.

    Every byte is accounted for: what is no whole request with a known length fails.
    """
    found: list[Request] = []
    for stream in sent:
        while stream:
            head, ends, rest = stream.partition(b"\r\n\r\n")
            assert ends, f"no request: {head[:80]!r}"
            line, *headers = head.decode("ascii").split("\r\n")
            length = next((int(h.split(":")[1]) for h in headers if h.lower().startswith("content-length:")), 0)
            assert not any(header.lower().startswith("transfer-encoding") for header in headers)
            assert len(rest) >= length
            request = Request(_plain(line), tuple(map(_plain, headers)), _body(rest[:length]))
            if not found or found[-1] != request:
                found.append(request)
            stream = rest[length:]
    return found


def _plain(text: str) -> str:
    return IDS.sub(r"\1_*", UUID4.sub("*", text))


def _body(body: bytes) -> bytes:
    return _plain(body.decode()).encode() if body.startswith(b"{") else body
