"""HPSv3, a model of human preference for images, as a reward for mmrl."""

__version__ = "0.1.0"
