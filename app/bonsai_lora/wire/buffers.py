"""The type of request and response bodies."""

Buffer = bytes | memoryview
