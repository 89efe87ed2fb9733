"""One pass against one pass per turn, timed: on the user's conversations, on synthetic ones, and against TRL.

`runs` is the entry point: it loads the model (`setup` says what is known of it), builds `cases`, lets them take turns
(`timing`) and describes the outcome (`results`); `plot` draws it.

Imports: checks, training, model, attention, prepare, tree, chat, data, recipe, files, errors.
"""
