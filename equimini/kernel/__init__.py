"""How attention runs: the operators and their derivatives, and where a binary comes in."""
