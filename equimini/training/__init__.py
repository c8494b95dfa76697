"""How tokenizer and generator are trained."""
