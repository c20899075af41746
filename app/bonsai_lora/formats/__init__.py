"""Bytes to core objects and back: safetensors files, PEFT adapters."""
