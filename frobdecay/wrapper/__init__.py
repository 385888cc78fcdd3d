"""The parts of ``FrobeniusDecay``, each of which knows one thing about optimizers.

proxy          an optimizer in front of another: groups, state and hooks
checks         what is known and checked about an optimizer before it is wrapped
param_groups   weight decay of factors becomes Frobenius decay, and checkpoints follow
rates          a group's options -> what is added where in one step
decay          one step of Frobenius decay
rounding       stochastic rounding of half-precision parameters
"""
