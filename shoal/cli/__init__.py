"""The `shoal` command: how people start, look at and stop nodes.

`main` is the application and its errors, `nodes` starts and stops, `status` asks control and shows the answer,
`words` reads what users write in options. Commands import what they need when they run: `shoal start` shall not wait
for the tables of `shoal status`.
"""
