"""Steps that know how far they move the product.

bound       any optimizer's step, no larger in the product than a multiple of lr
spectron    the published rule: orthogonalized momentum, with a rate from the factors' norms
"""
