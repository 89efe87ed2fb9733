"""`mtr report`: what runs wrote to their folders, read and compared.

Imports: store, recipe, console, errors.
"""
