"""The fused MoE layer and its configuration. Nothing in this room imports Transformers."""

from moetor.config import (
    Activation,
    ExpertsConfig,
    MoEConfig,
    RouterConfig,
    RunnerConfig,
    SharedExpertsConfig,
    SharedExpertsOrder,
)
from moetor.layer.context import ForwardContext, forward_context, get_forward_context
from moetor.layer.experts import Experts
from moetor.layer.gate import Gate
from moetor.layer.moe import MoELayer
from moetor.layer.parts import ChildNames, LayerParts
from moetor.layer.routing import CustomRouter, Router, Routing, SimulatedRouter
from moetor.layer.runner import ChunkedRunner, DefaultRunner, MoERunner
from moetor.layer.shared_experts import SharedExperts

__all__ = [
    "Activation",
    "ChildNames",
    "ChunkedRunner",
    "CustomRouter",
    "DefaultRunner",
    "Experts",
    "ExpertsConfig",
    "ForwardContext",
    "Gate",
    "LayerParts",
    "MoEConfig",
    "MoELayer",
    "MoERunner",
    "Router",
    "RouterConfig",
    "Routing",
    "RunnerConfig",
    "SharedExperts",
    "SharedExpertsConfig",
    "SharedExpertsOrder",
    "SimulatedRouter",
    "forward_context",
    "get_forward_context",
]
