"""How fast training is here, how far that is from what the machine can do, and why.

cases.py   what is measured        child.py   one case, in a process of its own
counts.py  FLOPs and bytes, from the algorithm        hlo.py   kernels, from the program
roof.py    what the machine can do        run.py   the loop over cases        show.py  table, plot
"""
