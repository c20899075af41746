"""What bodies and answers are made of."""

Buffer = bytes | memoryview
