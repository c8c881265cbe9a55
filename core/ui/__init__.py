"""The page: one module a tab, each a builder function of one `Runtime`. Imported by `app.py` alone.

Importing it must stay cheap, for the page is served before torch is there: nothing here imports torch or diffusers.
"""
