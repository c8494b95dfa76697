"""The authors' checkpoints turned into equimini's, and checkpoints made small."""
