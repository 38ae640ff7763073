"""The fused MoE layer. Nothing in this room imports Transformers."""

from moetor.layer.experts import Experts
from moetor.layer.moe import ChildNames, MoELayer
from moetor.layer.routing import CustomRouter, Router, Routing, SimulatedRouter
from moetor.layer.runner import ChunkedRunner, DefaultRunner, MoERunner
from moetor.layer.shared_experts import SharedExperts

__all__ = [
    "ChildNames",
    "ChunkedRunner",
    "CustomRouter",
    "DefaultRunner",
    "Experts",
    "MoELayer",
    "MoERunner",
    "Router",
    "Routing",
    "SharedExperts",
    "SimulatedRouter",
]
