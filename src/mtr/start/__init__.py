"""`mtr init` and `mtr doctor`: a recipe that works for this model, data and GPU, and what this machine can do.

Imports: plan, checks, training, model, attention, prepare, tree, chat, data, recipe, console, errors.
"""
