"""Everything that needs a CUDA device: parts that run in processes of their own.

parts      the table of parts, and how one or many are run
kernels    are they exact, two launches, within their tensors
features   steps of all kinds: any product, bounded, toward a weight
models     initialization, calibration, optimizers' states, numbers, files
steps      whole steps: captured, without waiting, in half precision, sharded, by other people
timing     how fast, beside the limits of the device
tiles      how the kernels could cut matrices up instead
"""
