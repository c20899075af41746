"""HTTP: the only folder that imports FastAPI. Start reading at `app.py`."""
