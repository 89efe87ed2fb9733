"""Training runs: the loop, what is set up before it, and what happens beside its steps.

`loop.train` is the entry point. `setup` builds a frozen `Run` of parts, each in a file of its own (feed, evaluation,
saving, generation, export, step_log); `state` is what changes and what checkpoints save.

Imports: model, attention, prepare, tree, chat, data, recipe, files, console, errors.
"""
