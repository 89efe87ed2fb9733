"""Everything that needs a CUDA device, in parts: `scripts/gpu PART`, or `python -m gpu PART` with benchmarks/ on the
path.

    preflight  is all here that the parts need?  standard library only, so it answers at once
    smoke      the first minutes: versions, kernels against dense attention, `mtr train`, one pack of an 8B model
    tests      the tests marked `gpu`
    packs      tokens/s, MFU and memory by pack size, backend and gradient checkpointing
    turns      single pass against one pass per turn, packed and padded, at 4 to 32 turns
    long       trains on a tree of 128k tokens
    qlora      trains an 8B model in 4 bits
    faults     in a rehearsal: cases that fail, run out of memory, or end their process

A part is a sequence of cases (`gpu.results`). With --rehearse it runs at a tiny size on any device and says what it
did not exercise (`gpu.rehearsal`). The models have random weights, their conversations are synthetic.
"""
