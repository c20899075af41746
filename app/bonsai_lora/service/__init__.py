"""Use cases, on top of core, formats, wire and storage; independent of HTTP."""
