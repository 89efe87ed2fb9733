"""The model: loaded and checked for exactness, LoRA added, its loss, its memory and its FLOPs.

`tree_model.TreeModel` is the module that is trained: its forward takes a pack and returns the pack's loss.

Imports: recurrence, attention, tree, recipe, console, errors.
"""
