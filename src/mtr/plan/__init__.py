"""`mtr plan`: what training on some data takes and saves, before a GPU is touched.

`planning` counts rows as training takes them (`counting`, `ways`), with the FLOPs of the model's config (`model`);
`on_gpu` adds `memory`, `duration` and cost on the GPUs of `gpus`, `verdict` says what it comes to, `plot` draws it.

Imports: checks, training, model, attention, prepare, tree, chat, data, recipe, files, console, errors.
"""
