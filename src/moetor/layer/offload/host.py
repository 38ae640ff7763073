"""Whether experts can be computed on the host."""

from __future__ import annotations

import torch

from moetor.config import ExpertsConfig
from moetor.errors import KernelRefusedError
from moetor.kernels.native.kernel import NativeKernel
from moetor.quantization.method import ModularMethod, QuantMethod

_KERNEL = NativeKernel()


def check_host(
    method: QuantMethod, config: ExpertsConfig, top_k: int, dtype: torch.dtype, name: str
) -> None:
    """Refuses experts that only slow kernels compute on a CPU.

    Args:
        name: of the layer, for the text.

    Raises:
        KernelRefusedError: the native kernel refuses, or the method routes inside its kernel.
    """
    asked = f"the experts of {name!r} cannot be computed in host memory: "
    if not isinstance(method, ModularMethod):
        raise KernelRefusedError(f"{asked}quant method {method.name!r} routes inside its kernel")
    reason = _KERNEL.refusal(method.query(config, top_k, torch.device("cpu"), dtype))
    if reason is not None:
        raise KernelRefusedError(
            f"{asked}kernel 'native' {reason}. Possible: all of them on the GPU, without "
            "cpu_experts, or unquantised, int8, int4 or mxfp4 experts of a form that it has"
        )
