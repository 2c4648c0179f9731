"""Proof that two combinations compute the same: one batch through both, and a comparison of everything on the way."""
