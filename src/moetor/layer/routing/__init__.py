"""Routers: from a token's logits to its experts."""

from moetor.kernels.routing import Routing
from moetor.layer.routing.router import CustomRouter, Router, RouterFunction
from moetor.layer.routing.simulator import SimulatedRouter

__all__ = ["CustomRouter", "Router", "RouterFunction", "Routing", "SimulatedRouter"]
