"""How pictures are drawn: Python interface, sample.py's modes, and what makes it fast."""
