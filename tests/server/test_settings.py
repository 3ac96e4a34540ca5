"""An invalid setting is refused immediately, with its name and without its value."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from post_server.settings import get_settings, settings_with
from post_shared.errors import InvalidInput


@pytest.fixture(autouse=True)
def _fresh_settings() -> Iterator[None]:
    get_settings.cache_clear()
    yield
    get_settings.cache_clear()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("POST_LEASE_SECONDS", "9"),  # with a heartbeat every 5 s
        ("POST_HEARTBEAT_SECONDS", "nan"),
        ("POST_PORT", "secret"),
        ("POST_LOG_LEVEL", "LOUD"),
        ("POST_DOCUMENT_BYTES", "-1"),
    ],
)
def test_invalid_settings_are_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(InvalidInput) as refused:
        get_settings()
    assert name.removeprefix("POST_").lower() in refused.value.detail.lower()
    assert "secret" not in refused.value.detail


def test_command_arguments_are_checked_like_the_environment() -> None:
    with pytest.raises(InvalidInput, match="POST_PORT"):
        settings_with(port=-3)
    with pytest.raises(InvalidInput, match=r"^lease_seconds is at least"):
        settings_with(lease_seconds=9)
    assert settings_with(port=0).port == 0


def test_a_log_level_may_have_any_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POST_LOG_LEVEL", "debug")
    assert get_settings().log_level == "debug"
