"""The paper's experiments, re-measured: ``python -m benchmarks.experiments --help``.

engine.py      trials that can be interrupted, side by side in processes of their own; JSON files
tables.py      means, standard errors, paired differences; Markdown and pictures from the JSON
images.py      what a trial on images is, and the four experiments that use it
catalogue.py   every experiment: its arms and its presets
"""
