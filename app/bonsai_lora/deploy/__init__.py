"""The service on engines of others."""
