"""Attention over a tree: one function registered with transformers, and the backends that compute it.

`interface` hands a pack's tree to every layer, `layers` says how far each one sees, `choice` picks the backend.

Imports: tree, recipe, console, errors.
"""
