"""The OpenAPI document, with what FastAPI cannot know: the key, and the model's names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI

from moetor.server.guards import OPEN_PATHS
from moetor.server.protocol import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody

_SCHEME = "key"
_REQUESTS = [body.__name__ for body in (ChatBody, CompletionBody, TokenizeBody, DetokenizeBody)]


class DocumentedApp(FastAPI):
    """An application whose document is complete.

    Args:
        names: of the model.
        needs_key: whether requests need the server's key.
        settings: of FastAPI.
    """

    def __init__(self, names: Sequence[str], *, needs_key: bool, **settings: Any) -> None:
        self._names, self._needs_key = list(names), needs_key
        super().__init__(**settings)

    def openapi(self) -> dict[str, Any]:
        """The document; made once."""
        if self.openapi_schema is None:
            made = super().openapi()
            for name in _REQUESTS:
                self._name_models(made["components"]["schemas"][name]["properties"]["model"])
            for path, methods in made["paths"].items():
                for operation in methods.values():
                    for parameter in operation.get("parameters", []):
                        if path == "/v1/models/{name}":
                            parameter["schema"]["enum"] = self._names
                    if self._needs_key and path not in OPEN_PATHS:
                        operation["security"] = [{_SCHEME: []}]
            if self._needs_key:
                scheme = {"type": "http", "scheme": "bearer"}
                made["components"]["securitySchemes"] = {_SCHEME: scheme}
        assert self.openapi_schema is not None
        return self.openapi_schema

    def _name_models(self, schema: dict[str, Any]) -> None:
        for kind in schema.get("anyOf", [schema]):
            if kind.get("type") == "string":
                kind["enum"] = self._names
