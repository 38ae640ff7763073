"""The application: endpoints, guards, errors."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, PlainTextResponse, Response

from moetor import __version__
from moetor.engine import EngineClient
from moetor.server import chat, completions, experts, page, tokens
from moetor.server.config import ServerConfig
from moetor.server.errors import add_handlers, error_body
from moetor.server.guards import BodyGuard, KeyGuard, RateGuard
from moetor.server.openapi import DocumentedApp
from moetor.server.responses import Health, ModelCard, ModelList, Version, answers
from moetor.server.service import Service
from moetor.server.streams import ClientGoneError

_CLOSED_REQUEST = 499


def create_app(engine: EngineClient, config: ServerConfig, model: str) -> FastAPI:
    """The server's application; whoever runs it shuts the engine down.

    Args:
        engine: is not shared with another application.
        config: of the server; host and port are whoever runs it's.
        model: what it is called, unless `config` names it.

    Raises:
        ConfigError: a key or the chat template cannot be read.
    """
    keys = config.api_keys()
    template = config.template()
    if template is not None:
        engine.tokenizer.chat_template = template
    service = Service(engine, config, model)
    app = DocumentedApp(
        service.names,
        needs_key=bool(keys),
        title="Moetor",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.service = service
    app.include_router(chat.router)
    app.include_router(completions.router)
    app.include_router(tokens.router)
    app.include_router(experts.router)
    app.include_router(page.router)
    _add_small(app)
    add_handlers(app)

    @app.exception_handler(ClientGoneError)
    async def gone(_: Request, __: ClientGoneError) -> Response:
        return Response(status_code=_CLOSED_REQUEST)  # nobody reads it

    # The last one added comes first.
    app.add_middleware(
        BodyGuard, most=int(config.max_body_mib * 2**20), timeout=config.read_timeout
    )
    if config.max_requests_per_minute is not None:
        app.add_middleware(RateGuard, per_minute=config.max_requests_per_minute)
    if keys:
        app.add_middleware(KeyGuard, keys=keys)
    if config.allow_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.allow_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    return app


def _add_small(app: FastAPI) -> None:
    service: Service = app.state.service

    @app.get("/v1/models", response_model=None, responses=answers(ModelList))
    async def models() -> dict[str, Any]:
        """The model, under each of its names."""
        return {"object": "list", "data": [_card(service, name) for name in service.names]}

    @app.get("/v1/models/{name:path}", response_model=None, responses=answers(ModelCard))
    async def model(name: str) -> dict[str, Any]:
        """One of its names."""
        service.check_model(name)
        return _card(service, name)

    @app.get("/health", response_model=None, responses=answers(Health))
    async def health() -> Response:
        """Whether the engine lives and takes requests."""
        trouble = service.trouble
        if trouble is None:
            return JSONResponse({"status": "ok", **service.state()})
        return JSONResponse(error_body(503, trouble, code="service_unavailable"), 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Figures for Prometheus."""
        text = service.metrics.text(await experts.expert_load(service.engine))
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    @app.get("/version", response_model=None, responses=answers(Version))
    async def version() -> dict[str, str]:
        """Of this package."""
        return {"version": __version__}


def _card(service: Service, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "moetor",
        "root": service.names[0],
        "parent": None,
        "max_model_len": service.engine.max_model_len,
    }
