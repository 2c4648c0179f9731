"""Measuring the training loop: the matrix of combinations, comparisons, and the gate."""
