"""Human Preference Score v2 and v2.1 as a reward for mmrl."""

__version__ = "0.1.0"
