"""The cost of parts of a model: the pieces that parameters and FLOPs are summed from. No torch.

``parts`` has the pieces (a matrix, a norm, a table) and how they add up; ``attention_cost``,
``recurrence_cost`` and ``layer_cost`` the closed forms of larger parts. A module of
``moe_lab.routing`` or ``moe_lab.model`` states its own cost in these terms, beside its
configuration; ``moe_lab.accounting`` does the same for published models and sums them.
"""
