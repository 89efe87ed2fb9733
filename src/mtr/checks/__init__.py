"""Checks before training: is one pass exact (`verify`), what is trained (`inspect`), what would be lost (`audit`).

Each returns its result as data; how it is shown is up to the command line.

Imports: model, attention, prepare, tree, chat, data, recipe, errors.
"""
