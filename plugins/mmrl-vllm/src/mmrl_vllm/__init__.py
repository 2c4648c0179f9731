"""vLLM as a rollout engine for mmrl."""

__version__ = "0.1.0"
