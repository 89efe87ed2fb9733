"""The subcommands of `mtr`, a file each: its options are declared beside what it does.

`options` and `session` hold what they share, `views` what people see. Heavy imports stay inside the commands.

Imports: pages, start, report, talk, plan, bench, checks, training, model, prepare, tree, chat, data, recipe, files,
console, errors.
"""
