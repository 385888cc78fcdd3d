"""When products decay and by how much: ``FrobeniusDecay``, ``Flambe``, and what they know.

frobenius     any optimizer of torch's, decaying products instead of factors
flambe        LAMB with the product's decay in its trust ratio
groups        param groups for those who build them; factory, for those who want a recipe
checks        what is known and checked about an optimizer before it is wrapped; conventions
division      weight decay of factors becomes Frobenius decay, and checkpoints follow
rates         a group's options -> what is added where in one step
decaying      one step of Frobenius decay; stability warns where it overshoots
rounding      stochastic rounding of half-precision parameters
proxy         an optimizer in front of another: groups, state and hooks
"""
