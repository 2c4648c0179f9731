"""Rewards for mmrl that like short texts without repetition."""

__version__ = "0.1.0"
