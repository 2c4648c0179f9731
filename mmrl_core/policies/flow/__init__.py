"""Diffusion models trained by flow matching: images and video. An action is one denoising step."""
