"""From files, folders and Hub data sets to conversations: sources, shapes, checks, and the order of an epoch.

A row becomes a Conversation or a SkippedRow with its reason; no row is lost silently. The order of an epoch is a
function of (seed, epoch).

Imports: recipe, files, errors.
"""
