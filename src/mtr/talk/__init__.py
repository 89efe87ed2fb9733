"""`mtr chat`: talk to a model with its adapter, in the contexts that its chat template makes.

    finding      what a folder or a Hub id holds
    loading      the model, its tokenizer and its template
    session      the conversation: prompts, answers, history
    interrupts   Ctrl-C
    commands     /undo, /save and the like
    typed        lines and pastes

Imports: training, model, attention, chat, recipe, files, console, errors.
"""
