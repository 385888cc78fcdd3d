"""The parts of the grouped executor: what is planned for the kernels of ``_triton.py``.

tiles       how matrices are cut up, by rank
tables      what each program of a launch has to do, as rows of numbers
sheets      which targets can be written in one launch
refusals    which products the kernels cannot take, and why
executor    plans, binds targets and coefficients, launches
"""
