"""The web page at ``/``: a read-only overview. It contains nothing secret; the browser calls the API."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import HTMLResponse
from fastapi.staticfiles import StaticFiles
from fastapi.templating import Jinja2Templates

_HERE = Path(__file__).parent
_templates = Jinja2Templates(_HERE / "templates")

router = APIRouter(include_in_schema=False)


@router.get("/", response_class=HTMLResponse)
def get_page(request: Request) -> HTMLResponse:
    """The page; its script and style come from ``/static``, as the content security policy requires."""
    return _templates.TemplateResponse(request, "page.html", {"version": version("post-transfer")})


def mount_static(app: FastAPI) -> None:
    """Serve the script and the style sheet."""
    app.mount("/static", StaticFiles(directory=_HERE / "static"), name="static")
