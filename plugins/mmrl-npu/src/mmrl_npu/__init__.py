"""Huawei Ascend NPUs as a device for mmrl."""

__version__ = "0.1.0"
