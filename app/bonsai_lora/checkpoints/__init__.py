"""Base checkpoints, and what is computed from them."""
