"""Models that are split into several GGUF files.

Names and keys are those of llama.cpp's tools/gguf-split (release b11434). The first file has all
keys, and maybe no tensors. Each says which one of how many it is, and how many tensors all have.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from bonsai_lora.checkpoints.file import BaseFile
from bonsai_lora.errors import BaseChangedError, BonsaiLoraError, InvalidBaseError
from bonsai_lora.formats import gguf
from bonsai_lora.formats.gguf import Header
from bonsai_lora.formats.gguf_layouts import TensorInfo

_PART = re.compile(r"(?P<model>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf", re.DOTALL)
_NUMBER, _COUNT, _TENSORS = "split.no", "split.count", "split.tensors.count"


@dataclass(frozen=True, slots=True)
class Parts:
    """A model in one or several files."""

    header: Header
    """The keys of the first file, and the tensors of all. Offsets are those in their own file."""
    holders: Mapping[str, BaseFile]
    """Tensor name -> file."""
    header_bytes: Mapping[str, int]
    """File name -> length of its header."""


def model_of(file: str) -> str | None:
    """Return the name of the model of which `file` is a part, by its name; None if it is whole."""
    match = _PART.fullmatch(file)
    return None if match is None else match["model"]


def read_parts(base: str, files: Mapping[str, BaseFile]) -> Parts:
    """Return the model in `files`, which are sorted by name.

    Raises InvalidBaseError for a malformed file, a missing part, and parts that do not belong
    together.
    """
    headers: dict[str, Header] = {}
    for name, file in files.items():
        try:
            headers[name] = gguf.read_header(file.read_at, file.size_bytes)
        except BaseChangedError:
            raise
        except BonsaiLoraError as error:
            raise _invalid(base, name, error.detail) from None
    first = next(iter(headers.values()))
    count = first.get(_COUNT)
    if len(files) > 1 or (isinstance(count, int) and count > 1):
        _check_complete(base, headers)
    tensors: dict[str, TensorInfo] = {}
    holders: dict[str, BaseFile] = {}
    for name, header in headers.items():
        twice = sorted(tensors.keys() & header.tensors.keys())
        if twice:
            raise _invalid(base, name, f"its tensor {twice[0]!r} is in another part, too")
        tensors |= header.tensors
        holders |= dict.fromkeys(header.tensors, files[name])
        if len(tensors) > gguf.MAX_TENSORS:
            raise _invalid(base, name, f"the parts have more than {gguf.MAX_TENSORS} tensors")
    joined = replace(first, tensors=MappingProxyType(tensors))
    return Parts(joined, holders, {name: one.data_start for name, one in headers.items()})


def _check_complete(base: str, headers: Mapping[str, Header]) -> None:
    """Raise InvalidBaseError unless the files are all parts of one model."""
    name, first = next(iter(headers.items()))
    count, match = first.get(_COUNT), _PART.fullmatch(name)
    if match is None or int(match["count"]) != count:
        raise _invalid(
            base,
            name,
            f"{_COUNT} is {count}, which is not what its name says; give the parts the names that "
            "llama-gguf-split gave them, such as model-00001-of-00003.gguf",
        )
    expected = [
        f"{match['model']}-{number:05}-of-{count:05}.gguf" for number in range(1, int(count) + 1)
    ]
    missing = [one for one in expected if one not in headers]
    if missing:
        raise InvalidBaseError(
            f"base {base!r} is split into {count} files, but {', '.join(missing[:8])} "
            f"{'is' if len(missing) == 1 else 'are'} missing; copy all parts beside each other",
            base=base,
        )
    for number, (part, header) in enumerate(headers.items()):
        if part not in expected:
            raise _invalid(
                base, part, f"it is not one of the {count} parts of {name}; move it away"
            )
        if header.get(_NUMBER) != number or header.get(_COUNT) != count:
            raise _invalid(
                base,
                part,
                f"it is part {header.get(_NUMBER)} of {header.get(_COUNT)} by its keys, counted "
                "from 0, but not by its name; copy it again",
            )
    total = sum(len(header.tensors) for header in headers.values())
    if total != first.get(_TENSORS):
        raise _invalid(
            base,
            name,
            f"{_TENSORS} is {first.get(_TENSORS)}, but the parts have {total} tensors; copy all of "
            "one version",
        )


def _invalid(base: str, file: str, reason: str) -> InvalidBaseError:
    return InvalidBaseError(f"{file} of base {base!r}: {reason}", base=base)
