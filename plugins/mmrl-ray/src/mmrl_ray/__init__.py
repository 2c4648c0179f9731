"""A Ray cluster as the launcher of mmrl."""

__version__ = "0.1.0"
