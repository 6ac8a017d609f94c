"""Golden tests: answers of the reference implementations, asserted step by step."""
