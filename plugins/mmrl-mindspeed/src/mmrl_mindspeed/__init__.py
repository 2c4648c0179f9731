"""Megatron as a training backend for mmrl, with MindSpeed on Ascend."""

__version__ = "0.1.0"
