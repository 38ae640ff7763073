"""Moetor: every Mixture-of-Experts model of Hugging Face Transformers at the speed of the hardware."""

__version__ = "0.1.0"
