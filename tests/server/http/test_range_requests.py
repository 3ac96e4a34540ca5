"""Downloads: whole, in ranges, as headers only or not at all, with the same rules for models and prompts."""

from __future__ import annotations

import pytest

from tests.server.http_harness import HttpHarness, code, prompt_bytes


@pytest.fixture(params=["model", "prompt"])
def address(request: pytest.FixtureRequest, http_harness: HttpHarness) -> str:
    """A file that alice may download."""
    _, student = http_harness.add_pair()
    if request.param == "model":
        return "/v1/models/small/files/model.safetensors"
    return f"/v1/prompts/{http_harness.push('alice', prompt_bytes(student.hash)).json()['id']}/file"


def test_head_sends_the_headers_of_get_and_no_body(http_harness: HttpHarness, address: str) -> None:
    whole = http_harness("alice", "GET", address)
    head = http_harness("alice", "HEAD", address, headers={"Range": "bytes=5-"})
    assert (head.status_code, head.content) == (200, b"")
    for name in ("etag", "content-length", "content-type", "accept-ranges", "cache-control"):
        assert head.headers[name] == whole.headers[name]
    known = http_harness("alice", "HEAD", address, headers={"If-None-Match": whole.headers["etag"]})
    assert known.status_code == 304
    allowed = http_harness("alice", "PUT", address).headers["allow"].split(", ")
    assert {"GET", "HEAD"} <= set(allowed)


def test_head_is_refused_like_get(http_harness: HttpHarness, address: str) -> None:
    assert http_harness._clients[None].head(address).status_code == 401
    assert http_harness._clients["bob"].head("/v1/prompts/prm_none/file").status_code == 404
    assert http_harness._clients["bob"].head("/v1/models/large/files/model.safetensors").status_code == 403


def test_ranges_and_conditions_work_for_every_file(http_harness: HttpHarness, address: str) -> None:
    whole = http_harness("alice", "GET", address)
    etag, size = whole.headers["etag"], len(whole.content)
    part = http_harness("alice", "GET", address, headers={"Range": "bytes=7-", "If-Range": etag})
    assert (part.status_code, part.content) == (206, whole.content[7:])
    assert part.headers["content-range"] == f"bytes 7-{size - 1}/{size}"
    for other in ('"0"', f"W/{etag}", "Wed, 21 Oct 2015 07:28:00 GMT"):  # only the strong ETag allows a resume
        assert (
            http_harness("alice", "GET", address, headers={"Range": "bytes=7-", "If-Range": other}).status_code == 200
        )
    assert http_harness("alice", "GET", address, headers={"If-None-Match": etag}).status_code == 304
    assert code(http_harness("alice", "GET", address, headers={"Range": f"bytes={size}-"})) == (416, "range_invalid")
