"""A finished model with everything a stranger needs and nothing else, as a folder or on the hub."""
