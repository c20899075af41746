"""Tensors in requests and responses, as JSON or binary."""
