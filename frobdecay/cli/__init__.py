"""The command line: checkpoints without the code of their models.

main       arguments, exit codes, errors in one line
read       a file or a folder -> named tensors, without running anything that is in it
skeleton   a model of layers that hold them, to plan ranks for
inspect    spectra of the weights, and what ranks would cost
spectra    the former, in parallel
show       both as a table and as a picture
merge      factorized checkpoint -> dense checkpoint
"""
