"""The LoRA maths on NumPy arrays: no I/O, no clock, no logging, no framework."""
