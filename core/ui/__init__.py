"""The page. Imported by `app.py` alone.

Each of these imports only from those after it: `page`, `events` and `api` build the page and connect its
`components`; the tabs `interventions`, `questions`, `layout`, `concepts` and `attribution`; `backend` runs the model
and checks input; `look` turns results into HTML, charts and downloads. `assets` holds the style sheets and scripts.

Importing it must stay cheap, for the page is served before torch is there: nothing here imports torch or diffusers.
"""
