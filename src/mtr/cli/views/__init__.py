"""What the commands print for people: a file per command, from the result that the command also writes as JSON.

Nothing is computed here but how to show it. Tables fit 80 columns.

Imports: checks, chat, console.
"""
