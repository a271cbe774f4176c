"""Render the starter corpus: emoji drawings in three styles, with names and keywords, under free licences."""
