"""Tables for people: repeated layers in one line, names whole, numbers never cut.

fold     names that differ in a number or a word -> one name with braces
table    columns of text, as wide as the terminal allows
"""
