"""Recurrent layers that follow the tree, beside attention: a state is taken from the parent, wherever the path forks.

A recurrent layer carries a state along the row: the last inputs of a short convolution, or the matrix of a linear
attention. In a tree each token continues the state of its parent, which is not the token before it in the row.

    segments     runs of tokens cut at every fork      chunks    the same, cut into pieces of equal size
    levels       any scan, segment after segment       states    from chunk to chunk, down the tree
    convolution, delta_rule, state_space, ...          one file a kind of mixer, each by one of these two ways
    kinds        the table of kinds                    seams     how a transformers model comes to call them

The mixers' own forwards stay as they are.

Imports: attention, tree, errors.
"""
