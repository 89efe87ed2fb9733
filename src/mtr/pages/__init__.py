"""Pages of HTML that need no network, and pictures: a conversation as it is trained, and runs side by side.

Imports: report, checks, tree, chat, data, files, console.
"""
