"""How the schema came to be: Alembic's scripts, run whenever a database is opened.

A new one: change `tables.py`, add a script to `versions` after the newest, and let the tests compare the two.
"""
