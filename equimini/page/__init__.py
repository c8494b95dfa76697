"""A page to draw in: one strip, grown, changed and taken back column by column."""
