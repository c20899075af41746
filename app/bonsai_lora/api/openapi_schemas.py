"""Changes of the generated OpenAPI schemas for those who generate clients from them."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from bonsai_lora import errors

REFERENCE = "#/components/schemas/"
"""How a reference to a schema begins."""


def refine_schemas(document: dict[str, Any]) -> None:
    """Make optional fields optional for generators, and list the codes of errors."""
    schemas = document["components"]["schemas"]
    bodies = [
        operation.get("requestBody")
        for item in document["paths"].values()
        for operation in item.values()
    ]
    for name in reachable(bodies, schemas):
        for field in schemas[name].get("properties", {}).values():
            _describe_default(field)
    for schema in schemas.values():
        for field in schema.get("properties", {}).values():
            if field.get("default", ...) is None:
                del field["default"]
    for item in document["paths"].values():
        for operation in item.values():
            for parameter in operation.get("parameters", ()):
                _drop_null(parameter["schema"])
    schemas["Problem"]["properties"]["code"]["x-extensible-enum"] = sorted(
        errors.BY_CODE.keys() - {errors.TooLargeError.code, errors.InvalidError.code}
    )


def _describe_default(field: dict[str, Any]) -> None:
    """Move a field's default to its description: generators take it for a required field."""
    default = field.pop("default", None)
    if default is not None:
        words = [field.get("description"), f"default: `{json.dumps(default)}`"]
        field["description"] = "; ".join(one for one in words if one)


def _drop_null(schema: dict[str, Any]) -> None:
    """Remove `null` from the types of a query parameter, which has no way to send it."""
    kinds = schema.get("anyOf", [])
    if {"type": "null"} in kinds:
        kinds.remove({"type": "null"})
        if len(kinds) == 1:
            schema.update(schema.pop("anyOf")[0])


def reachable(part: Any, schemas: Mapping[str, Any]) -> set[str]:
    """Return the names of the schemas that a part of the document refers to, even indirectly."""
    found: set[str] = set()
    new = set(_references(part))
    while new:
        found |= new
        new = set(_references([schemas[name] for name in new])) - found
    return found


def _references(part: Any) -> Iterator[str]:
    """Yield the names of the schemas that a part of the document refers to."""
    if isinstance(part, dict):
        target = part.get("$ref")
        if isinstance(target, str) and target.startswith(REFERENCE):
            yield target.removeprefix(REFERENCE)
        part = list(part.values())
    if isinstance(part, list):
        for one in part:
            yield from _references(one)
