"""Bonsai LoRA: the adapter server for Bonsai and Qwen3 models."""
