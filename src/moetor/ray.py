"""The server as replicas on a Ray cluster (Ray Serve): `serve run moetor.ray:build_app model=...`.

Each replica is one process with an engine of its own, and answers what `moetor serve` answers; Ray
listens, shares requests out, asks for health, replaces replicas and adds or removes them. Needs the
extra `moetor[ray]`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve

from moetor.cli.console import quiet_transformers
from moetor.cli.flags import Parser, UsageError, add_flags, parse_options, settings_words
from moetor.cli.serve import ServeOptions, model_source
from moetor.engine import AsyncEngine, EngineConfig
from moetor.server.app import create_app
from moetor.server.config import ServerConfig

NAME = "moetor"
# What concerns a process that listens and ends by itself.
_RAYS_OWN = {
    "host": "http_options of Ray Serve",
    "port": "http_options of Ray Serve",
    "log_level": "logging_config of Ray Serve",
    "log_interval": "the metrics of every replica",
    "config": "args in Ray Serve's own file",
}
_HEALTH_PERIOD_S, _HEALTH_TIMEOUT_S = 2.0, 20.0


class Replica:
    """One engine behind its own application.

    Args:
        settings: the fields of `ServeOptions`.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._options = ServeOptions(**settings)
        quiet_transformers()
        self._engine = AsyncEngine.from_model(
            self._options.model,
            config=EngineConfig.of(self._options),
            **model_source(self._options),
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The application that this replica answers with."""
        server = ServerConfig.server_part(self._options)
        return create_app(self._engine, server, self._options.model)

    def check_health(self) -> None:
        """Asked by Ray, which replaces a replica that raises.

        Raises:
            RuntimeError: the engine has stopped, or hangs.
        """
        if self._engine.trouble is not None:
            raise RuntimeError(f"the engine {self._engine.trouble}")

    async def shutdown(self) -> None:
        """Ends the engine."""
        await self._engine.shutdown()

    def __del__(self) -> None:
        """Called by Ray when running requests have ended."""
        if hasattr(self, "_engine"):
            asyncio.run(self.shutdown())


def replica_options(args: Mapping[str, Any]) -> ServeOptions:
    """The options that `args` describe.

    Args:
        args: flags of `moetor serve` and their values, `model` beside them.

    Raises:
        UsageError: one is no flag, has a wrong value, or is not a replica's to choose.
    """
    names = {str(key).replace("-", "_") for key in args}
    for name in sorted(names & _RAYS_OWN.keys()):
        raise UsageError(f"{name} is not a replica's to choose; use {_RAYS_OWN[name]}")
    parser = Parser(prog="moetor serve", description="", epilog="")
    add_flags(parser, ServeOptions)
    words = settings_words(parser, ServeOptions, dict(args), "Ray Serve's args")
    options = parse_options(parser, ServeOptions, words)
    if options.processes > 1:
        raise UsageError(
            f"a replica is one process, and {options.processes} ranks were asked for; leave out "
            "tensor_parallel_size and data_parallel_size, and take more replicas"
        )
    return options


def build_app(args: Mapping[str, Any]) -> serve.Application:
    """The application for Ray Serve.

    What a deployment has besides (how many replicas, autoscaling, GPUs) is Ray's own to configure,
    in the file or by `.options`; the defaults here are one replica with one GPU where the cluster
    has any, unless `device` is `cpu`.

    Args:
        args: flags of `moetor serve` and their values, `model` beside them.

    Raises:
        UsageError: see `replica_options`.
    """
    options = replica_options(args)
    return deployment(options).bind(asdict(options))


def deployment(options: ServeOptions) -> serve.Deployment:
    """The deployment without its arguments."""
    gpus = options.device != "cpu" and ray.cluster_resources().get("GPU", 0) > 0
    if options.device.startswith("cuda") and not gpus:
        raise UsageError(f"device {options.device} was asked for, and the cluster has no GPU")
    made: serve.Deployment = serve.deployment(
        name=NAME,
        # Ray holds back what is above this, and may give it to another replica.
        max_ongoing_requests=options.max_num_seqs,
        health_check_period_s=_HEALTH_PERIOD_S,
        health_check_timeout_s=_HEALTH_TIMEOUT_S,
        graceful_shutdown_timeout_s=options.drain_timeout,
        ray_actor_options={"num_gpus": int(gpus)},
    )(serve.ingress()(Replica))
    return made
