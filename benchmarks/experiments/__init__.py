"""The paper's experiments, re-measured: ``python -m benchmarks.experiments --help``.

catalogue.py     every experiment, and its trials; vision.py and writing.py: arms and presets
engine.py        trials that can be interrupted, side by side in processes of their own; JSON files
trials.py        what all trials have in common: the loop, the choice of an epoch, the state
images.py        a trial on images          translation.py   from one language to another
language.py      of a language model        lora.py          of adapters; text.py reads text
tables.py        means, standard errors, paired differences; Markdown and pictures from the JSON
verdicts.py      the paper's claims, judged by a rule
"""
