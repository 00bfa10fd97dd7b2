"""The page that `moeship verify --report` writes: several engines of one model side by side.

contents.py  what the page shows
places.py    positions of the text where engines and reference differ most, and greedy text beside the reference
visible.py   text of others in HTML: escaped, control characters visible; numbers
charts.py    line charts as inline SVG
tables.py    tables: engines, questions, costs
page.py      the page

The page needs no network: its style is in it, and its pictures are inline SVG.
"""
