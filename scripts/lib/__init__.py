"""What the scripts beside this directory are made of.

`setup` runs before anything is installed: its modules use the standard library only.
"""
