"""How fast training is on this machine, how far that is from the machine's limit, and why.

cases.py   the cases              child.py   measures one case, in a process of its own
counts.py  FLOPs and bytes, from the algorithm        hlo.py   kernels, from the program
roof.py    the machine's limit    run.py     the loop over cases      show.py  tables and plot
"""
