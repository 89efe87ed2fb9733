"""The idea itself: turn views merged into a prefix tree, flattened, masked and packed. No model, no tokenizer.

The mask is one line: visible(q, k) = (k <= q) & (q < subtree_end[k]).

Imports: nothing of mtr.
"""
