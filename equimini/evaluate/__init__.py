"""How good pictures are, measured by a frozen network's features."""
