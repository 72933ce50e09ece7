"""What the benchmarks share, without pytest:

work      sizes and inputs of a layer of experts
peers     the same layer by everyone who has one
device    how to time a call and count its memory, on a CPU or a GPU
timing    contenders in turns, checked against each other before
ceilings  what the machine can do at most
results   files of results with the machine they are from; a line for each row
figures   pictures of results
"""
