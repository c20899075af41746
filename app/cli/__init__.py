"""The `bonsai-lora` command."""
