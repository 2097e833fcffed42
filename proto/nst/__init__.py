"""The contract's Python code, generated from `proto/nst/v1`."""
