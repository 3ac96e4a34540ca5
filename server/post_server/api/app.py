"""The FastAPI app. ``uvicorn post_server.api.app:create_app --factory`` serves it."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute

from post_server.api import dashboard, health
from post_server.auth.rate_limits import RateLimits
from post_server.datasets import endpoints as datasets
from post_server.datasets import upload_endpoints as uploads
from post_server.db.database import Database
from post_server.distillations import endpoints as distillations
from post_server.evaluations import endpoints as evaluations
from post_server.http import problems
from post_server.http.dependencies import Context
from post_server.http.metrics import Metrics
from post_server.http.middleware import BodyLimitMiddleware, RequestMiddleware
from post_server.jobs import endpoints as jobs
from post_server.jobs.event_stream import EventFeed
from post_server.logs import configure_logs
from post_server.models import endpoints as models
from post_server.predictions import completion_endpoints as completions
from post_server.predictions import endpoints as predictions
from post_server.predictions import queue_client
from post_server.prompts import endpoints as prompts
from post_server.reports import endpoints as reports
from post_server.settings import Settings, get_settings
from post_server.storage.blob_store import BlobStore
from post_server.transfers import endpoints as transfers
from post_shared.errors import PROBLEM_MEDIA_TYPE

_ROUTERS = (  # their paths are tried in this order: the most frequent first
    jobs.router,
    models.router,
    datasets.router,
    uploads.router,
    prompts.router,
    distillations.router,
    transfers.router,
    evaluations.router,
    reports.router,
    predictions.router,
    completions.router,
    health.router,
    dashboard.router,
)
_ABOUT = (
    "Adapt a large language model that you do not own to data that you may not share: "
    "privacy-preserving soft prompt transfer."
)


def create_app(settings: Settings | None = None) -> FastAPI:
    """The app on the settings' database and storage. The schema must be up to date: ``Database.migrate``."""
    settings = settings or get_settings()
    configure_logs(settings)
    database = Database.from_settings(settings)
    app = FastAPI(
        title="POST",
        version=version("post-transfer"),
        description=_ABOUT,
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
        docs_url=None,  # its page loads scripts from other hosts
        redoc_url=None,
        lifespan=_lifespan,
        generate_unique_id_function=_operation_id,
    )
    app.state.metrics = Metrics(database)
    limits = RateLimits(settings, app.state.metrics.uncounted)
    app.state.context = Context(settings, database, BlobStore.from_settings(settings), limits)
    app.state.event_feed = EventFeed(database)
    for router in _ROUTERS:
        app.include_router(router)
    dashboard.mount_static(app)
    problems.install(app)
    max_bytes = {
        "/v1/datasets": settings.dataset_bytes,
        "/v1/uploads/[^/]+/parts/[^/]+": settings.part_bytes,
        "/v1/prompts": settings.prompt_bytes,
    }
    app.add_middleware(BodyLimitMiddleware, default=settings.document_bytes, paths=max_bytes)
    app.add_middleware(RequestMiddleware, metrics=app.state.metrics)
    _describe_problems(app)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    gc.collect()
    gc.freeze()  # these objects live as long as the process: scanning them again would delay requests
    yield
    await queue_client.close()
    app.state.context.database.dispose()


def _operation_id(route: APIRoute) -> str:
    """The function's name, which generated clients use for their methods."""
    return route.name


def _describe_problems(app: FastAPI) -> None:
    """In the OpenAPI document, give errors the media type that they are sent with, and their codes."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        document = generate()
        operations = [
            operation
            for path in document["paths"].values()
            for operation in path.values()
            if isinstance(operation, dict)
        ]
        for status, response in (item for operation in operations for item in operation.get("responses", {}).items()):
            content = response.get("content", {})
            schema = content.get("application/json", {}).get("schema", {})
            if status >= "400" and str(schema.get("$ref", "")).endswith("/Problem"):
                del content["application/json"]
                content[PROBLEM_MEDIA_TYPE] = {"schema": problems.describe_problem(int(status))}
        return document

    app.openapi = openapi  # type: ignore[method-assign]
