"""All pairs of a model in two launches on a GPU, nothing copied.

kernels     every Gram in one launch, every update in a second one; launches starts them
tiles       how matrices are cut up, by rank
tables      what each program of a launch has to do, as rows of numbers, and which targets share one
refusals    which products the kernels cannot take, and why
executor    plans, binds targets and coefficients, launches
"""
