"""From conversations to turns: each assistant message in its inference context, as token ids.

Nothing is known about any model or template: what a chat template does is found by rendering sentinel conversations
(`trials`), and every completion is read back as inference reads it before it is trained on (`draft`).

Imports: data, recipe, console, errors.
"""
