"""Experts in host memory, computed there, with a cache of some of them on the GPU."""

from moetor.layer.offload.group import ExpertOffload
from moetor.layer.offload.layer import OffloadedLayer
from moetor.layer.offload.plan import LayerNeed, MemoryPlan, plan_memory

__all__ = ["ExpertOffload", "LayerNeed", "MemoryPlan", "OffloadedLayer", "plan_memory"]
