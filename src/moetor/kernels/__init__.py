"""Tensors in, tensors out: the arithmetic of a MoE layer. No `nn.Module`, no state, no other room
of Moetor.
"""
