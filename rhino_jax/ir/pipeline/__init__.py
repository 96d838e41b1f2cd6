"""An assignment cut in pipeline stages: which part of it runs where, and what crosses.

``flow`` reads who makes what, ``labels`` says where an op would like to run, ``chunks``
cuts so that no two parts wait for one another.
"""
