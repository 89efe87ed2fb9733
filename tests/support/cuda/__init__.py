"""A CUDA path that a CPU can check: fake cuda tensors, generated kernels, and what the step asks of the host.

`scripts/cuda_check` runs all parts, each in a process of its own:

    step        the whole training step on meta and fake cuda tensors: device mixes and host synchronizations
    recompiles  graphs that torch.compile makes over a run of packs of many lengths
    kernels     flex attention's Triton kernels, generated and compiled for sm_90 and sm_100: what each one takes
    numerics    the same kernels in Triton's interpreter, against dense attention in float64
    recurrent   the packages' kernels for recurrent layers, in the interpreter, against the recurrence in float64
    varlen      the arguments of FlashAttention's operators against their schemas and fake kernels

`stub` lets torch's CPU build believe in a GPU. It has to be loaded before torch, so nothing here imports torch.
"""
