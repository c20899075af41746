"""Cut a CustomResourceDefinition down to what a manifest uses: `trim_crd.py CRD.yaml MANIFEST.yaml`.

Schemas of fields that the manifest does not use are dropped, but not their names, so that a
misspelt field is still refused. Writes JSON to standard output.
"""

import json
import sys
from pathlib import Path

import yaml

LABELS = {"$schema": "http://json-schema.org/draft-07/schema#"}


def trim(schema, value):
    """Return `schema` without what `value` does not reach, closed to unknown fields."""
    kept = {name: schema[name] for name in schema.keys() - {"description", "properties", "items"}}
    if isinstance(value, list) and "items" in schema:
        kept["items"] = merged([trim(schema["items"], one) for one in value])
    if isinstance(value, dict) and "properties" in schema:
        kept["properties"] = {
            name: trim(one, value[name]) if name in value else {}
            for name, one in schema["properties"].items()
        }
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            kept["additionalProperties"] = False
    return kept


def merged(schemas):
    """Return one schema that knows what any of `schemas` of one type does."""
    result = {}
    for schema in schemas:
        for name, one in schema.items():
            known = result.get(name)
            if isinstance(known, dict) and isinstance(one, dict):
                result[name] = merged([known, one])
            elif known in (None, {}):
                result[name] = one
    return result


def main(definition, manifest):
    crd = yaml.safe_load(Path(definition).read_text())
    used = yaml.safe_load(Path(manifest).read_text())
    version = used["apiVersion"].rpartition("/")[2]
    (schema,) = (
        one["schema"]["openAPIV3Schema"]
        for one in crd["spec"]["versions"]
        if one["name"] == version
    )
    schema["properties"]["metadata"] = {"type": "object"}
    print(json.dumps(LABELS | trim(schema, used), indent=1, sort_keys=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
