"""Text that callers chose, made safe to print."""


def printable(text: str) -> str:
    """Return `text` with line ends and other control characters escaped.

    Printed as they are, they could forge lines of a log and control a terminal.
    """
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)


def is_unicode(text: str) -> bool:
    """Return whether `text` is without lone surrogates, which UTF-8 does not have."""
    return not any("\ud800" <= one <= "\udfff" for one in text)
