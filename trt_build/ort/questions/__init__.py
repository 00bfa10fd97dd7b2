"""What `moeship verify` asks of an engine: is what lies in its folder the checkpoint, and is that what it computes?

stored_graph.py    a graph as it lies in the folder: nodes, and where each initializer is in the data file
stored_weights.py  the weights that an engine stores, in the checkpoint's own layout
graph_facts.py     attributes of nodes, operands and rotary caches against config.json
weights.py         first question: are these the checkpoint's weights?
graph.py           second question: does the graph compute what the codes say?
greedy.py          greedy text, for a report
cost.py            third question, in parts: what did the quantiser cost in each layer, role and expert?
"""
