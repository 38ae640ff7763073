"""Hugging Face Transformers: recognising MoE blocks, fusing them, verifying, loading.

The only room that imports Transformers; releases outside the supported range are refused here.
"""

from moetor.huggingface.explain import explain
from moetor.huggingface.fuse import fuse, unfuse
from moetor.huggingface.report import BlockReport, FusionReport
from moetor.huggingface.verify import BlockCheck, VerifyReport, verify
from moetor.huggingface.versions import check_versions

__all__ = [
    "BlockCheck",
    "BlockReport",
    "FusionReport",
    "VerifyReport",
    "explain",
    "fuse",
    "unfuse",
    "verify",
]

check_versions()
