"""The page's HTTP: routes, who may look, and what a browser may do with the page.

Every response has a content security policy without exceptions: no inline script or style, nothing from
elsewhere, no forms, no frames. Requests other than GET and HEAD are refused before anything is read.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from importlib import resources
from typing import Any
from urllib.parse import parse_qsl
from uuid import UUID

import jinja2
from markupsafe import Markup
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from virt_sse.errors import printable
from virt_sse.page.access import COOKIE, Sessions, is_loopback_name
from virt_sse.page.document import HostPart, Overview
from virt_sse.page.picture import draw
from virt_sse.page.views import Index, Page, key_name, middle, moment, size

HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; "
    "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cache-control": "no-store",
}
_STATIC = {"page.css": "text/css", "page.js": "text/javascript", "icon.svg": "image/svg+xml"}
_LONGEST_TARGET = 2048
_WARM_UP_PATHS = ("/", "/domains", "/disks", "/keys", "/audit", "/page.css", "/disks/none")

Newest = Callable[[], Awaitable[Overview]]


class DocumentUnavailableError(Exception):
    """The agent does not answer, and there is no older document."""


def application(newest: Newest, sessions: Sessions | None) -> ASGIApp:
    """The application.

    :param newest: returns the document; raises DocumentUnavailableError.
    :param sessions: checks requests on loopback; ``None`` for a socket whose peers have been checked.
    """
    return _Guard(_Pages(newest).starlette(), sessions)


async def warm_up(app: ASGIApp) -> None:
    """Handle a request for each page, with an empty document: afterwards, no code is left to be imported.

    :param app: the value of :func:`application`.
    """
    assert isinstance(app, _Guard)  # noqa: S101 -- the contract of this function
    for path in _WARM_UP_PATHS:
        await app.pages(_scope(path), _nothing, _ignored)


async def _nothing() -> Message:
    return {"type": "http.disconnect"}


async def _ignored(_message: Message) -> None:
    return


def _scope(path: str) -> Scope:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(b"host", b"localhost")],
        "client": None,
        "server": None,
        "warm-up": True,
    }


class _Guard:
    """Admits requests to *pages*, and adds :data:`HEADERS` to all responses."""

    def __init__(self, pages: ASGIApp, sessions: Sessions | None) -> None:
        self.pages = pages
        self._sessions = sessions

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        request = Request(scope)

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = {name for name, _ in message.get("headers", ())}
                added = [(n.encode(), v.encode()) for n, v in HEADERS.items() if n.encode() not in given]
                message = {**message, "headers": [*message.get("headers", ()), *added]}
            await send(message)

        answer = self._refusal(request)
        await (answer or self.pages)(scope, receive, sent)

    def _refusal(self, request: Request) -> Response | None:
        """A response in place of the page; ``None`` if the page may be shown."""
        if request.method not in ("GET", "HEAD"):
            return _said(405, "Only GET and HEAD.", {"allow": "GET, HEAD"})
        if len(request.scope["raw_path"]) + len(request.scope["query_string"]) > _LONGEST_TARGET:
            return _said(414, "The address is too long.")
        hosts = request.headers.getlist("host")
        if len(hosts) != 1 or not is_loopback_name(hosts[0]):
            return _said(421, "This page answers under the names of this host's loopback only.")
        is_visit = request.headers.get("sec-fetch-mode") == "navigate"
        if request.headers.get("sec-fetch-site") in ("cross-site", "same-site") and not is_visit:
            return _said(403, "This page is not for other sites.")
        return self._unauthorised(request) if self._sessions else None

    def _unauthorised(self, request: Request) -> Response | None:
        assert self._sessions is not None  # noqa: S101 -- checked by the caller
        query = parse_qsl(request.scope["query_string"].decode("latin-1"), max_num_fields=20)
        if codes := [value for name, value in query if name == "token"]:
            if request.method == "GET" and self._sessions.redeem(codes[0]):
                cookie = f"{COOKIE}={self._sessions.cookie}; HttpOnly; SameSite=Strict; Path=/"
                return Response(status_code=303, headers={"location": "/", "set-cookie": cookie})
            return _said(401, "This link was used before, or is older than ten minutes.", _CHALLENGE)
        if self._sessions.admits(request.cookies.get(COOKIE), request.headers.get("authorization")):
            return None
        return _said(401, "Open the link that 'virt-sse agent page' prints on the host.", _CHALLENGE)


_CHALLENGE = {"www-authenticate": "Bearer"}


def _said(status: int, text: str, headers: Mapping[str, str] | None = None) -> Response:
    return Response(f"{text}\n", status, headers, "text/plain; charset=utf-8")


class _Pages:
    """The pages."""

    def __init__(self, newest: Newest) -> None:
        self._newest = newest
        self._index: Index | None = None
        self._templates = _environment()
        folder = resources.files("virt_sse.page").joinpath("static")
        self._static = {name: folder.joinpath(name).read_bytes() for name in _STATIC}

    def starlette(self) -> Starlette:
        """The routes."""
        routes = [
            Route("/", self._overview),
            Route("/domains", self._domains),
            Route("/domains/{id}", self._domain),
            Route("/disks", self._disks),
            Route("/disks/{id}", self._disk),
            Route("/keys", self._keys),
            Route("/keys/{id}", self._key),
            Route("/audit", self._audit),
            *(Route(f"/{name}", self._file(name)) for name in _STATIC),
        ]
        handlers: dict[Any, Any] = {HTTPException: _no_page, DocumentUnavailableError: _silent}
        app = Starlette(routes=routes, exception_handlers=handlers)
        app.router.redirect_slashes = False
        return app

    def _file(self, name: str) -> Callable[[Request], Awaitable[Response]]:
        async def answer(_request: Request) -> Response:
            headers = {"cache-control": "no-cache"}
            return Response(self._static[name], headers=headers, media_type=_STATIC[name])

        return answer

    async def _current(self, request: Request) -> Index:
        if "warm-up" in request.scope:
            return Index(_empty())
        overview = await self._newest()
        if self._index is None or self._index.overview is not overview:
            self._index = Index(overview)
        return self._index

    def _page(self, name: str, index: Index, title: str, **values: Any) -> Response:
        template = self._templates.get_template(name)
        return HTMLResponse(template.render(index=index, title=title, now=index.overview.time, **values))

    async def _overview(self, request: Request) -> Response:
        index = await self._current(request)
        return self._page("overview.html", index, index.host.name, section="/")

    async def _domains(self, request: Request) -> Response:
        index = await self._current(request)
        page = Page.of(index.overview.domains, request.query_params.get("page"))
        return self._page("domains.html", index, "Domains", section="/domains", page=page)

    async def _domain(self, request: Request) -> Response:
        index = await self._current(request)
        domain = index.domains.get(_uuid(request))
        if domain is None:
            raise HTTPException(404)
        pictures = [
            (use, disk, draw(disk, use.target, domain.name) if disk.layers else None)
            for use in domain.disks
            if use.disk_id and (disk := index.disks.get(use.disk_id))
        ][:_MOST_PICTURES]
        values = {"section": "/domains", "domain": domain, "pictures": pictures}
        return self._page("domain.html", index, domain.name, **values)

    async def _disks(self, request: Request) -> Response:
        index = await self._current(request)
        show = request.query_params.get("show")
        show = show if show in ("copies", "unfinished", "deleted") else None
        page = Page.of(index.disks_shown(show), request.query_params.get("page"))
        return self._page("disks.html", index, "Disks", section="/disks", page=page, show=show)

    async def _disk(self, request: Request) -> Response:
        index = await self._current(request)
        disk = index.disks.get(_uuid(request))
        if disk is None:
            raise HTTPException(404)
        uses = index.uses.get(disk.id, [])
        running = next((use for use in uses if use.domain.state != "off"), None)
        where = (running.target, running.domain.name) if running else ()
        drawn = draw(disk, *where) if disk.layers else None
        values = {"section": "/disks", "disk": disk, "uses": uses, "drawn": drawn}
        return self._page("disk.html", index, disk.name, **values)

    async def _keys(self, request: Request) -> Response:
        index = await self._current(request)
        page = Page.of(list(index.keys.values()), request.query_params.get("page"))
        return self._page("keys.html", index, "Keys", section="/keys", page=page)

    async def _key(self, request: Request) -> Response:
        index = await self._current(request)
        key = index.keys.get(request.path_params["id"])
        if key is None:
            raise HTTPException(404)
        page = Page.of(index.stops(key), request.query_params.get("page"))
        return self._page("key.html", index, "Key", section="/keys", key=key, page=page)

    async def _audit(self, request: Request) -> Response:
        index = await self._current(request)
        page = Page.of(index.overview.uses[::-1], request.query_params.get("page"))
        return self._page("audit.html", index, "Key uses", section="/audit", page=page)


_MOST_PICTURES = 32
_NOBODY = UUID(int=0)


def _uuid(request: Request) -> UUID:
    try:
        return UUID(request.path_params["id"])
    except ValueError:
        return _NOBODY


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("virt_sse.page"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
        cache_size=-1,
        finalize=_shown,
    )
    environment.filters |= {"middle": middle, "size": size, "moment": moment, "key_name": key_name}
    for name in environment.list_templates():
        environment.get_template(name)
    return environment


def _shown(value: object) -> object:
    """Text with control characters and marks of direction escaped; escaped for HTML later."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


async def _no_page(_request: Request, exc: Exception) -> Response:
    return _said(exc.status_code if isinstance(exc, HTTPException) else 404, "There is no such page.")


async def _silent(_request: Request, exc: Exception) -> Response:
    return _said(503, f"{exc}.", {"retry-after": "2"})


def _empty() -> Overview:
    host = HostPart(
        name="", version="", began="", libvirt="", libvirt_connected=False, last_look=None, poll_seconds=1
    )
    return Overview(time=datetime.now(UTC), host=host)
