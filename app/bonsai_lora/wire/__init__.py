"""Tensors in requests and answers: JSON and binary forms."""
