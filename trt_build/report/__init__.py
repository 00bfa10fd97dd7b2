"""Pages: `moeship verify --report` shows several engines of one model side by side, `moeship inspect --text --report`
how a text uses the experts of a checkpoint.

contents.py  what the page of verify shows
places.py    positions of the text where engines and reference differ most, and greedy text beside the reference
visible.py   text of others in HTML: escaped, control characters visible; numbers
charts.py    line charts and heat maps as inline SVG
tables.py    tables: engines, questions, costs
page.py      the page of verify, and the parts that both pages have
usage_page.py  the page of inspect

No page needs a network: its style is in it, and its pictures are inline SVG.
"""
