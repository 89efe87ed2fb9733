"""A trial that goes on: what people and machines can do to mtr, a file for each kind of thing.

Each file has a tuple ATTEMPTS. To add one, write how to prepare the harm, and how the command has to end:

    refused("an unknown key", train(training={"lerning_rate": 1}), "training.lerning_rate", "learning_rate")
    done("an empty answer", ..., holds=...)         exit code 0, and what must hold then

`train(...)` and its like write a recipe and give the command; `after(function, ...)` first does something to the
place. See `support.hostile` for what is checked of each, and `table.py` for all of them. Those that take long are run
with `pytest --slow` or by `scripts/hostile_test.py`.
"""
