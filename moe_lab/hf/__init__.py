"""What Hugging Face configurations say, read in one place and without torch: names of fields, where
the text part is, which layers are sparse, how many experts and slots a router has.

Routing, accounting, capturing and importing read these tables; none keeps its own.
"""
