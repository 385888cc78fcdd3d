"""Everything that needs a CUDA device: parts that run in processes of their own.

parts      the table of parts, and how one or many are run
smoke      is it right there: kernels, captured steps, no waiting, other people's loops
timing     how fast: beside the limits of the device, and what one would do otherwise
tiles      how the kernels could cut matrices up instead
"""
