"""Durable storage of named sets."""
