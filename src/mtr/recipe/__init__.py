"""The recipe: what a YAML file may say, checked before anything heavy is imported.

Every error names the file, the key and the fix. A loaded recipe is frozen and contains every default.

Imports: console, errors.
"""
