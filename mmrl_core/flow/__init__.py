"""The arithmetic of denoising by steps, shared by policies and engines: schedules, kernels, embeddings on disk."""
