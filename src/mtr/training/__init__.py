"""Training runs: the loop, what is set up before it, and what happens beside its steps.

    loop, setup, state, learner                                        a run; `loop.train` is the entry point
    feed, step_log, evaluation, saving, generation, export, stopping   its parts, which the loop calls by name
    folder, checkpoint, metrics, rejects, environment                  what it writes
    provenance                                                         what it was made from
    log, progress, tracking, exact_match                               what it reports
    processes, parallel, launch, signals, faults                       several processes, and what can go wrong
    optim, fitting                                                     optimizer and learning rate; what fits in memory
    merge, model_card, serving, hub                                    what others get

Imports: store, model, recurrence, attention, prepare, tree, chat, data, recipe, files, console, errors.
"""
