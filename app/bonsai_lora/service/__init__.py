"""Use cases over core, formats, wire and storage; knows nothing of HTTP."""
