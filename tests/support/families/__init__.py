"""Evidence of which families of models are exact, and how: the table in docs/models.md.

catalogue   the families: config, checkpoints that people know, what is special
evidence    a tiny random model of a family: what is trained against plain passes
page        the results as Markdown
"""
