"""The HTTPS service: the steps around each request's handler.

In this order: access token, permission, body, operation, audit record, response. The body of an unauthorized
request is not read.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import re
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from typing import TypeVar
from urllib.parse import parse_qs, parse_qsl

from starlette.applications import Starlette
from starlette.convertors import Convertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from virt_sse.vault.http.calls import Call, Reply
from virt_sse.vault.http.limits import Limiter, Limits, TooManyRequestsError
from virt_sse.vault.http.requests import (
    ClientGoneError,
    correlation_of,
    disk_of,
    headers_of,
    read_body,
    refuse,
    respond,
    source_of,
)
from virt_sse.vault.http.routes import OPERATIONS, Operation
from virt_sse.vault.identity.principals import Principal
from virt_sse.vault.identity.tokens import OAuthError, bearer
from virt_sse.vault.refusals import (
    FailureRefusal,
    Refusal,
    bad_parameter,
    forbidden,
    internal,
    throttled,
    unauthorized,
)
from virt_sse.vault.trail import AuditedRequest, Trail
from virt_sse.vault.vault import Vault

_log = logging.getLogger(__name__)

_API_VERSION = re.compile(
    r"(?:2016-10-01|7\.[0-6](?:-preview(?:\.\d)?)?|2025-0\d-01(?:-preview)?)\Z", re.ASCII
)
_LONGEST_PATH = 1024
_TOKEN_REQUEST_LIMIT = 16 << 10
T = TypeVar("T")


class _Segment(Convertor[str]):
    """A segment of a path, possibly empty: the SDK requests the newest version as ``/keys/NAME/``."""

    regex = "[^/]*"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("segment", _Segment())


class VaultApplication:
    """The ASGI application over *vault*, and its thread pools."""

    def __init__(self, vault: Vault, limits: Limits) -> None:
        self.vault = vault
        self.trail = Trail(vault.audit)
        # Threads: RSA releases the interpreter lock, and each operation waits for the audit log's disk.
        self.quick = ThreadPoolExecutor(max(8, 4 * (os.cpu_count() or 1)), "vault-quick")
        self.slow = ThreadPoolExecutor(2, "vault-slow")
        self.limiter = Limiter(_guarded(self._starlette()), limits)

    def close(self) -> None:
        """Wait for running operations, and end the threads."""
        self.quick.shutdown()
        self.slow.shutdown()

    def challenge(self) -> str:
        """Build the ``WWW-Authenticate`` challenge, in Azure's form: token endpoint and audience."""
        settings = self.vault.settings
        return f'Bearer authorization="{settings.url}/{settings.tenant}", resource="{settings.audience}"'

    def _starlette(self) -> Starlette:
        tenant, tokens = self.vault.settings.tenant, self.vault.tokens
        routes = [Route(each.path, _Endpoint(self, each), methods=[each.method]) for each in OPERATIONS]
        routes += [
            Route(f"/{tenant}/oauth2/v2.0/token", _TokenEndpoint(self), methods=["POST"]),
            Route(f"/{tenant}/v2.0/.well-known/openid-configuration", _constant(tokens.metadata())),
            Route(f"/{tenant}/discovery/v2.0/keys", _constant(tokens.jwks())),
            Route("/healthz", self._health),
        ]
        app = Starlette(
            routes=routes, exception_handlers={HTTPException: _unroutable, TooManyRequestsError: _throttled}
        )
        app.router.redirect_slashes = False
        return app

    async def refresh(self, since: float | None = None) -> None:
        """Take note of changes by other instances, before a request.

        :param since: as for :meth:`~virt_sse.vault.freshness.Freshness.check`.
        :raise Refusal: When the database cannot be read.
        """
        if self.vault.freshness.due(since):
            await _run(self.quick, partial(self.vault.freshness.check, since))

    async def _health(self, _request: Request) -> Response:
        """Tell a balancer whether this instance can serve: 503 without its database."""
        try:
            await self.refresh()
        except Refusal as refusal:
            return JSONResponse(refusal.body(), refusal.status)
        return JSONResponse({"status": "ok"})


class _Endpoint:
    """One operation of the vault."""

    def __init__(self, application: VaultApplication, operation: Operation) -> None:
        self._application = application
        self._vault = application.vault
        self._operation = operation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        operation, path = self._operation, scope["path_params"]
        headers = headers_of(scope)
        about = f"{self._vault.settings.url}{operation.subject.format(name=path.get('name', '')[:128])}"
        request = AuditedRequest(
            action=operation.action,
            key=about,
            actor=None,
            version=path.get("version", "")[:64] or None,
            disk=disk_of(headers),
            source=source_of(scope),
            correlation=correlation_of(headers),
        )
        try:
            answer = await self._answer(request, scope, receive, headers)
        except ClientGoneError:
            return
        except Refusal as refusal:
            await refuse(scope, send, refusal, challenge=self._application.challenge())
        else:
            await respond(scope, send, answer.status, answer.body)

    async def _answer(
        self, request: AuditedRequest, scope: Scope, receive: Receive, headers: Mapping[str, str]
    ) -> Reply:
        token = headers.get("authorization")
        if token is None:
            raise unauthorized("An access token is required.")
        try:
            principal = await self._caller(token, scope["path_params"].get("name", ""))
            request = request.by(principal)
            self._permit(principal, scope["path_params"].get("name", ""))
            query = dict(parse_qsl(scope["query_string"].decode("latin-1")))
            if self._operation.is_azures:
                _check_api_version(query)
            body = await read_body(receive, headers, self._operation.body_limit)
        except Refusal as refusal:
            await _run(self._application.quick, partial(self._application.trail.refused, request, refusal))
            raise
        call = Call(
            vault=self._vault,
            principal=principal,
            path=dict(scope["path_params"]) | {"path": scope["path"]},
            query=query,
            body=body,
        )
        pool = self._application.slow if self._operation.slow else self._application.quick
        return await _run(pool, partial(self._perform, request, call))

    async def _caller(self, authorization: str, key: str) -> Principal:
        """The principal of an access token.

        An instance that has not heard of the principal, or of its permission, asks the database before it
        refuses: another instance may just have created or granted it. Management knows all earlier changes.
        """
        began = time.monotonic()
        await self._application.refresh(None if self._operation.is_azures else began)
        with contextlib.suppress(Refusal):
            principal = self._principal(authorization)
            if self._operation.permission is None or principal.may(self._operation.permission, key):
                return principal
        await self._application.refresh(began)
        return self._principal(authorization)

    def _principal(self, authorization: str) -> Principal:
        token = bearer(authorization)
        if token is None:
            raise unauthorized("The token must be a bearer token.")
        return self._vault.tokens.principal_of(token)

    def _permit(self, principal: Principal, key: str) -> None:
        permission = self._operation.permission
        if permission is not None and not principal.may(permission, key):
            raise forbidden(
                f"The application 'appid={principal.client_id};oid={principal.object_id}' does not have keys "
                f"{permission.value} permission on key vault '{self._vault.settings.name}'.",
                "ForbiddenByPolicy",
            )

    def _perform(self, request: AuditedRequest, call: Call) -> Reply:
        """Run the operation and record it; in a thread."""
        try:
            if self._operation.announced:
                self._application.trail.requested(request)
            answer = self._operation.handler(call)
        except Refusal as refusal:
            if isinstance(refusal, FailureRefusal):
                _log.error("%s", refusal.detail)
            self._application.trail.refused(request, refusal)
            raise
        except Exception as exc:
            _log.exception("%s failed", self._operation.action)
            self._application.trail.refused(request, internal())
            raise internal() from exc
        if self._operation.recorded:
            if answer.subject is not None:
                request = dataclasses.replace(request, key=f"{self._vault.settings.url}{answer.subject}")
            self._application.trail.allowed(request, answer.version)
        return answer


class _TokenEndpoint:
    """``POST /TENANT/oauth2/v2.0/token``."""

    def __init__(self, application: VaultApplication) -> None:
        self._application = application

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = headers_of(scope)
        request = AuditedRequest(
            action="token",
            key=self._application.vault.settings.token_endpoint,
            actor=None,
            version=None,
            disk=None,
            source=source_of(scope),
            correlation=correlation_of(headers),
        )
        try:
            body = await read_body(receive, headers, _TOKEN_REQUEST_LIMIT)
            answer = await _run(self._application.quick, partial(self._issue, request, body))
        except ClientGoneError:
            return
        except OAuthError as error:
            await respond(scope, send, error.status, error.body())
        except Refusal as refusal:
            await refuse(scope, send, refusal)
        else:
            await respond(scope, send, 200, answer)

    def _issue(self, request: AuditedRequest, body: bytes) -> dict[str, object]:
        trail = self._application.trail
        try:
            fields = parse_qs(body.decode("ascii"), max_num_fields=32)
        except ValueError:
            raise OAuthError(400, "invalid_request", "the request is not a form") from None
        form = {name: values[0] for name, values in fields.items() if len(values) == 1}
        try:
            self._application.vault.freshness.check(time.monotonic())
            principal, answer = self._application.vault.tokens.issue(form)
        except OAuthError as error:
            trail.refused(request, Refusal(error.status, error.error, error.description))
            raise
        except FailureRefusal as refusal:
            _log.error("%s", refusal.detail)
            raise
        except Exception as exc:
            _log.exception("issuing a token failed")
            raise internal() from exc
        trail.allowed(request.by(principal), None)
        return answer


def _check_api_version(query: Mapping[str, str]) -> None:
    """Refuse a request for a version of Azure's interface that this vault does not know.

    :raise Refusal: When the version is missing or unknown.
    """
    given = query.get("api-version")
    if given is None:
        raise bad_parameter("The query parameter api-version must be specified.")
    if not _API_VERSION.match(given):
        raise bad_parameter(f"The api-version {given[:32]!r} is not supported.")


def _guarded(app: ASGIApp) -> ASGIApp:
    """Wrap *app* with a filter for malformed paths."""

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not _is_well_formed(scope):
            await refuse(scope, send, bad_parameter("The path is too long or has invalid characters."))
            return
        await app(scope, receive, send)

    return guarded


def _is_well_formed(scope: Scope) -> bool:
    path: str = scope["path"]
    return len(path) <= _LONGEST_PATH and path.isprintable() and b"%2f" not in scope["raw_path"].lower()


def _constant(document: Mapping[str, object]) -> Callable[[Request], Response]:
    def endpoint(_request: Request) -> Response:
        return JSONResponse(document)

    return endpoint


def _unroutable(_request: Request, exc: Exception) -> Response:
    status = exc.status_code if isinstance(exc, HTTPException) else 404
    code, message = (
        ("MethodNotAllowed", "Method not allowed.") if status == 405 else ("NotFound", "No such path.")
    )
    return JSONResponse(Refusal(status, code, message).body(), status)


def _throttled(_request: Request, _exc: Exception) -> Response:
    refusal = throttled(1)
    return JSONResponse(refusal.body(), refusal.status, {"retry-after": str(refusal.retry_after)})


async def _run(pool: Executor, function: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(pool, function)
