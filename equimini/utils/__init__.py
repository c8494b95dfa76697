"""Tools of every command: command line, errors, files, images, checkpoints, processes."""
