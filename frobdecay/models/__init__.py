"""What is done to a model: weights are chosen, ranks planned, factors put in place and taken out.

select       the grammar of include= and exclude=
fitness      which weights can be factorized, and for the others, why not (memory, ties)
candidates   a chosen weight with its parametrization
ranks, plan  which rank where, and the table that says so
factorize    factors in the place of weights, all or none (surgery, stacking, progress)
merge        back to dense weights, or to chains of plain layers (unroll/)
checkpoints/ files of factors
"""
