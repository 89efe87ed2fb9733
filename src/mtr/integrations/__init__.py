"""The public API of `mtr`: rows to trees, a collator and a loss for other trainers, any exact model over a tree.

Imports: model, attention, prepare, tree, chat, data, recipe, errors.
"""
