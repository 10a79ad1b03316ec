"""Hostile input for everything that reads what a target wrote. Run by scripts/fuzz.

A target makes cases from a random number generator and checks one: any exception is a finding. Some
cases are damaged copies of real files, some are made up and compared with a plain, slow reader.
"""
