"""What a Program is made of: regions, cuts, segments, loop pairs, equal segments.

Pure functions of a Program and of what is state and what is batch in it. What an op
costs or means is passed in: the kinds that are heavy, the function that gives rules.
"""
