"""The repositories that Hub clients see, by name, a page at a time."""

from collections.abc import Iterator

from bonsai_lora.checkpoints.bases import BaseFolder
from bonsai_lora.service.view import SetView

ADAPTERS = "adapters"
BASES = "bases"
PAGE = 100
"""Most repositories of a page: each may open a set, and compare it with a base."""
_LOOKED_AT = 10_000
"""Most names that are compared with a search for one page."""

Name = tuple[str, str]
"""Owner and name of a repository."""


def page_of(
    store: SetView, bases: BaseFolder, author: str, search: str, cursor: str, limit: int
) -> tuple[list[Name], str]:
    """Return up to `limit` repositories after `cursor`, and the cursor of the next page.

    That is empty after the last page. A page may have none although there are more.
    """
    known = [ADAPTERS, BASES, *sorted(bases.names())]
    owners = [one for one in known if author in ("", one)]
    wanted, found = search.lower(), []
    for looked_at, name in enumerate(_after(store, owners, known[2:], cursor)):
        text = "/".join(name)
        if wanted in text.lower():
            found.append(name)
        if len(found) == limit or looked_at == _LOOKED_AT:
            return found, text
    return found, ""


def _after(store: SetView, owners: list[str], bases: list[str], cursor: str) -> Iterator[Name]:
    """Yield the repositories after `cursor`, in the order of `owners`."""
    first, _, last = cursor.partition("/")
    if first:
        owners = owners[owners.index(first) :] if first in owners else []
    for owner in owners:
        after = last if owner == first else ""
        names = iter(bases) if owner == BASES else _sets(store, after)
        yield from ((owner, name) for name in names if name > after)


def _sets(store: SetView, after: str) -> Iterator[str]:
    while page := store.page("", after=after, base_model_name=None, limit=PAGE).records:
        yield from (one.name for one in page)
        after = page[-1].name
