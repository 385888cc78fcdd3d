"""A budget of parameters: what stays dense under it, and how the rest is divided among weights."""
