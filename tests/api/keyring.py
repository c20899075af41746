"""Keys files for tests, and clients that send a key."""

import json
import os

import httpx

from bonsai_lora.service.keys import SCOPES, digest_of, new_token

TENANT_SCOPES = [scope for scope in SCOPES if scope != "admin"]


class KeysFileMaker:
    """Writes a keys file; `add` returns the new key."""

    def __init__(self, path):
        self.path = path
        self.entries = []

    def add(self, scopes=TENANT_SCOPES, prefixes=("acme.",), number=None, **more):
        fresh, token = new_token()
        if number is not None:
            token = token.replace(fresh, number)
        self.entries.append(
            {
                "id": number or fresh,
                "sha256": digest_of(token.encode()).hex(),
                "scopes": list(scopes),
                "prefixes": list(prefixes),
                **more,
            }
        )
        self.write(json.dumps({"keys": self.entries}))
        return token

    def write(self, text):
        new = self.path.with_suffix(".new")
        new.write_text(text)
        new.chmod(0o600)
        os.replace(new, self.path)


def caller(url, token):
    """A client that sends `token`, or no key."""
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    return httpx.Client(base_url=url, headers=headers, timeout=30)
