"""Are runs, or a table, any good?"""
