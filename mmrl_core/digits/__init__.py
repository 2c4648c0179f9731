"""Handwritten digits: a data set, two classifiers and a small diffusion model, all made on this machine in seconds."""
