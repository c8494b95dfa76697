"""Pictures of what a model does.  `python -m equimini.show` lists them."""
