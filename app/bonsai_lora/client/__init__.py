"""The client library: the HTTP contract as Python calls."""
