"""verl for mmrl, and mmrl for verl: a training backend, rewards, estimators, losses and data sets, both ways."""

__version__ = "0.1.0"
