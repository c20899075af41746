"""The HTTP API. Only this package imports FastAPI; `app.py` is the entry point."""
