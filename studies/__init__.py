"""The studies: which loss sees what, and what pictures it makes. `python -m studies` regenerates docs/studies."""
