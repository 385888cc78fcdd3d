"""The command line: checkpoints without the code of their models.

main       arguments, exit codes, errors in one line
reading    a file -> named tensors, without running anything that is in it
inspecting spectra of the weights, and what ranks would cost
merging    factorized checkpoint -> dense checkpoint
"""
