"""Hugging Face Transformers: recognising MoE blocks, fusing them, verifying, loading.

The only room that imports Transformers. Releases outside the supported range are refused when this
package is imported, which is when the Hugging Face part is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from moetor.huggingface.versions import check_versions

if TYPE_CHECKING:
    from moetor.huggingface.expert_mapping import ExpertNames
    from moetor.huggingface.explaining import explain
    from moetor.huggingface.fusing import fuse, unfuse
    from moetor.huggingface.model_classes import MoEForCausalLM, MoEForMultimodalLM
    from moetor.huggingface.parallelism import parallelize
    from moetor.huggingface.report import BlockReport, FusionReport, ParallelReport
    from moetor.huggingface.routed_experts import RoutingRecord, record_routing, replay_routing
    from moetor.huggingface.verifying import BlockCheck, VerifyReport, verify

__all__ = [
    "BlockCheck",
    "BlockReport",
    "ExpertNames",
    "FusionReport",
    "MoEForCausalLM",
    "MoEForMultimodalLM",
    "ParallelReport",
    "RoutingRecord",
    "VerifyReport",
    "explain",
    "fuse",
    "parallelize",
    "record_routing",
    "replay_routing",
    "unfuse",
    "verify",
]

_HOME_OF = {
    "BlockCheck": "verifying",
    "BlockReport": "report",
    "ExpertNames": "expert_mapping",
    "FusionReport": "report",
    "ParallelReport": "report",
    "MoEForCausalLM": "model_classes",
    "MoEForMultimodalLM": "model_classes",
    "RoutingRecord": "routed_experts",
    "VerifyReport": "verifying",
    "explain": "explaining",
    "fuse": "fusing",
    "parallelize": "parallelism",
    "record_routing": "routed_experts",
    "replay_routing": "routed_experts",
    "unfuse": "fusing",
    "verify": "verifying",
}

check_versions()


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)
