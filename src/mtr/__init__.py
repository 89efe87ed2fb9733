"""mtr: fine-tune reasoning models on multi-turn chats, every turn in its inference context, in one pass.

The command line is `mtr`. For other trainers than its own, these names are loaded when they are used:

    TreeBuilder(tokenizer)              rows of chats -> rows of trees, for `datasets.Dataset.map`
    count_turns(trees)                  what of the rows is trained, and what is not, by reason
    TreeCollator()                      rows of trees -> a batch
    load(name)                          a model that takes such batches and returns their loss
    with tree_attention(model):         the same for a model that is there already
    TreeTrainerMixin                    goes before a trainer's class: TRL, and weights that are no whole numbers
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mtr.errors import UserError
    from mtr.integrations.collator import TreeCollator
    from mtr.integrations.columns import count_turns
    from mtr.integrations.forward import tree_attention
    from mtr.integrations.loading import load
    from mtr.integrations.rows import TreeBuilder
    from mtr.integrations.trainer import TreeTrainerMixin

__version__ = "0.1.0"
__all__ = [
    "TreeBuilder",
    "TreeCollator",
    "TreeTrainerMixin",
    "UserError",
    "count_turns",
    "load",
    "tree_attention",
]

_PLACES = {
    "TreeBuilder": "mtr.integrations.rows",
    "TreeCollator": "mtr.integrations.collator",
    "TreeTrainerMixin": "mtr.integrations.trainer",
    "UserError": "mtr.errors",
    "count_turns": "mtr.integrations.columns",
    "load": "mtr.integrations.loading",
    "tree_attention": "mtr.integrations.forward",
}


def __getattr__(name: str) -> object:
    if name not in _PLACES:
        raise AttributeError(f"module 'mtr' has no attribute {name!r}")
    return getattr(_import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
