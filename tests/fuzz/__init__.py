"""Fuzzing of every operator: `make fuzz`, or `PYTHONPATH=tests python -m fuzz --help`.

Hostile calls (`hostile.py`) hold the operators to their contract on whatever a caller may pass;
differential calls (`differential.py`) hold them to loops that know nothing of this library
(`loops.py`). Both run in a child process, so that a crash or a hang is a finding and not the end.
"""
