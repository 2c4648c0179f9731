"""CHANGEME: one line."""

__version__ = "0.1.0"
