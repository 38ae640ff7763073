"""What the Triton kernels share on the device: activations, a row's norm and masked loads.

This module and its neighbours `*_kernels.py` import Triton and are imported at the first launch.
An activation travels as the compile-time tuple of `choose.activation_constants`.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

import triton  # type: ignore[import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, unused-ignore]
from triton.language.extra.cuda import (  # type: ignore[import-not-found, unused-ignore]
    gdc_launch_dependents,
    gdc_wait,
)


@triton.jit
def chain(PDL: tl.constexpr):
    """Waits for the launches before this one, then lets the next one start.

    In this order, so that a launch may rely on all that lies two or more launches back without
    waiting for it.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def norm_of_row(y, gain, H: tl.constexpr, EPS: tl.constexpr, SCALE_FIRST: tl.constexpr):
    """The RMS norm of one expert's row, 0 beyond H (`moetor.kernels.norm`)."""
    if SCALE_FIRST:
        y = y * gain
    y = y * tl.rsqrt(tl.sum(y * y, axis=0) / H + EPS)
    if not SCALE_FIRST:
        y = y * gain
    return y


@triton.jit
def _tanh(x):
    """tanh without a library call; the series keeps relative precision where 1 - e cancels."""
    e = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - e) / (1.0 + e)
    y = x * x
    series = x * (1.0 + y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835)))))
    return tl.where(tl.abs(x) < 0.2, series, tl.where(x < 0, -large, large))


@triton.jit
def soft_cap(x, cap):
    """cap * tanh(x / cap)"""
    return cap * _tanh(x / cap)


@triton.jit
def _at_most(x, limit):
    return tl.where(x > limit, limit, x)  # a NaN stays one


@triton.jit
def _within(x, limit):
    return tl.where(x < -limit, -limit, _at_most(x, limit))


@triton.jit
def _pointwise(x, ACT: tl.constexpr):
    if ACT[0] == "silu":
        y = x / (1.0 + tl.exp(-ACT[1] * x))
    elif ACT[0] == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT[0] == "gelu_tanh":
        # 0.5 (1 + tanh u) = sigmoid(2 u)
        y = x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    elif ACT[0] == "relu":
        y = tl.where(x < 0, 0.0, x)
    elif ACT[0] == "identity":
        y = x
    else:
        tl.static_assert(ACT[0] == "relu2")
        positive = tl.where(x < 0, 0.0, x)
        y = positive * positive
    return y


@triton.jit
def activate_gated(gate, up, ACT: tl.constexpr):
    """f(gate) * (up + shift) in float32, with every option of `moetor.config.Activation`."""
    if ACT[2] is not None and not ACT[3]:
        gate = _at_most(gate, ACT[2])
        up = _within(up, ACT[2])
    if ACT[5] is not None:
        up = soft_cap(up, ACT[6])
        out = soft_cap(gate, ACT[5]) / (1.0 + tl.exp(-gate))
    else:
        out = _pointwise(gate, ACT)
        if ACT[2] is not None and ACT[3]:
            out = _at_most(out, ACT[2])
            up = _within(up, ACT[2])
        up = up + ACT[4]
    return out * up


@triton.jit
def activate_ungated(x, ACT: tl.constexpr):
    """f(x) in float32."""
    if ACT[2] is not None and not ACT[3]:
        x = _at_most(x, ACT[2])
    y = _pointwise(x, ACT)
    if ACT[2] is not None and ACT[3]:
        y = _at_most(y, ACT[2])
    return y
