"""Where endpoints run: blocking ones must not block the event loop, and others take no thread."""

from __future__ import annotations

import threading

from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from pydantic import BaseModel, model_validator

from post_server.api import app as app_module
from post_server.api import dashboard
from post_server.http.routing import Route


def test_a_blocking_endpoint_runs_in_a_thread_and_its_result_is_validated_in_the_loop() -> None:
    threads: dict[str, int] = {}
    router = APIRouter(route_class=Route)

    class Answer(BaseModel):
        value: int

        @model_validator(mode="before")
        @classmethod
        def _note(cls, value: object) -> object:
            threads["check"] = threading.get_ident()
            return value

    @router.get("/waits", response_model=Answer)
    def waits(value: int) -> dict[str, int]:
        threads["waits"] = threading.get_ident()
        return {"value": value}

    @router.get("/quick")
    async def quick() -> None:
        threads["loop"] = threading.get_ident()

    app = FastAPI()
    app.include_router(router)
    with TestClient(app) as client:
        assert client.get("/waits?value=3").json() == {"value": 3}
        assert client.get("/waits?value=x").status_code == 422
        assert client.get("/quick").status_code == 200
    assert threads["check"] == threads["loop"] != threads["waits"]


def test_every_documented_endpoint_uses_this_route_class() -> None:
    for router in app_module._ROUTERS:
        if router is not dashboard.router:
            assert all(isinstance(route, Route) for route in router.routes if isinstance(route, APIRoute)), (
                router.prefix
            )
