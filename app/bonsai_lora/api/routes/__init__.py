"""The routes, one module per section of the API; they only translate HTTP to use cases."""
