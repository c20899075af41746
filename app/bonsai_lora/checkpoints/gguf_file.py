"""A planned GGUF file, put together from parts."""

from collections.abc import Callable

from bonsai_lora.checkpoints.parts import Made, Part
from bonsai_lora.formats.gguf_layouts import TensorInfo
from bonsai_lora.formats.gguf_writer import Plan


def file_parts(
    planned: Plan, make_head: Callable[[], bytes], part_of: Callable[[str, TensorInfo], Part]
) -> list[Part]:
    """Return the header, then the part of each tensor, with zeros where the plan has gaps."""
    parts: list[Part] = [Made(len(planned.head), make_head)]
    position = len(planned.head)
    for name, info in planned.tensors.items():
        parts += [_zeros(info.start - position), part_of(name, info)]
        position = info.stop
    return [*parts, _zeros(planned.total_bytes - position)]


def _zeros(size: int) -> Part:
    return Made(size, lambda: bytes(size))
