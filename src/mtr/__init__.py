"""mtr: fine-tune reasoning models on multi-turn chats, every turn in its inference context, in one pass."""

__version__ = "0.1.0"
