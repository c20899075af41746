"""One module per section of the HTTP contract; each route only translates."""
