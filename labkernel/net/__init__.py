"""Mechanism: bridges, addresses, published ports, names and user-mode networking. Knows nothing of Docker's verbs."""
