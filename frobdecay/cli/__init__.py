"""The command line: checkpoints without the code of their models.

main       arguments, exit codes, errors in one line
read       a file -> named tensors, without running anything that is in it
inspect    spectra of the weights, and what ranks would cost
merge      factorized checkpoint -> dense checkpoint
"""
