"""How much memory a model takes: the one home of that arithmetic. No torch, nothing allocated.

`shapes` has the tensors of a decoder, `estimate` what holding, running and training it takes,
`fit` the machines, and the cheapest way to be in one.
"""
