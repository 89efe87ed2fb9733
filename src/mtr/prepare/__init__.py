"""Conversations become optimizer steps: rendered, weighted, merged, packed, in background workers.

A step depends on its rows alone, so it can be built by any process in any worker.

Imports: tree, chat, data, recipe, errors.
"""
