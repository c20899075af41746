"""The calls of the contract, one function each: it says what to send and how to decode."""
