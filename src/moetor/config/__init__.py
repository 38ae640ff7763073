"""What a MoE layer is, as data: frozen, keyword-only dataclasses that are checked when they are
made. Nothing here imports torch.
"""

from moetor.config.experts import (
    Activation,
    ActivationName,
    ClampPlace,
    ExpertsConfig,
    PostNormOrder,
    SharedCombine,
    SharedExpertsConfig,
    SharedExpertsOrder,
)
from moetor.config.layer import (
    MoEConfig,
    RunnerConfig,
    RunnerName,
)
from moetor.config.router import (
    GroupMask,
    GroupScore,
    Precision,
    RouterConfig,
    ScoreOrder,
    Scoring,
)

__all__ = [
    "Activation",
    "ActivationName",
    "ClampPlace",
    "ExpertsConfig",
    "GroupMask",
    "GroupScore",
    "MoEConfig",
    "PostNormOrder",
    "Precision",
    "RouterConfig",
    "RunnerConfig",
    "RunnerName",
    "ScoreOrder",
    "Scoring",
    "SharedCombine",
    "SharedExpertsConfig",
    "SharedExpertsOrder",
]
